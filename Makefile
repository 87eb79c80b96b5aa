# Each target does its own set-up. It needs only python3 (3.11 or newer) and make.
PYTHON ?= python3
VENV   := .venv
PYTHONS ?= 3.12 3.13
BIN    := $(VENV)/bin
DOCS   := .venv-docs
READY  := $(VENV)/.ready
DEV    := $(VENV)/.dev
PYTEST := $(BIN)/python -m pytest
# pip would compile all modules, most of which are never imported: three quarters of its time. Python compiles each on
# its first import, unless it must not write.
INSTALL := -m pip install --quiet $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)
PIP     := $(BIN)/python $(INSTALL)
# One process more than cores, because one process runs Ray's tests, some of which wait.
PARALLEL := -n $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) < 8 ? $$(getconf _NPROCESSORS_ONLN) + 1 : 9 ))) \
    --dist loadgroup --no-loadscope-reorder
NUMERICS := $(addprefix tests/edt_core/test_,models*.py diffusion*.py metrics*.py training*.py solvers.py generation.py \
    autoencoder.py inception.py extractors.py alignment.py labels.py pipeline.py)

.PHONY: install install-dev quickstart test test-light test-ray test-all test-numerics test-core test-pythons coverage faults check prose format docs docs-serve docs-version reference lock wheel notebook examples bench recording clean

install: $(READY)              ## what a run needs

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) -r requirements.lock
	PYTHONWARNINGS=ignore $(PIP) --no-deps --editable .
	touch $@

install-dev: $(DEV)            ## and what tests, checks and benchmarks need

$(DEV): $(READY) requirements-dev.lock
	$(PIP) -r requirements.lock -r requirements-dev.lock
	touch $@

quickstart: install            ## digits -> shards -> latents -> EDT -> metrics -> registry -> report
	$(BIN)/edt run

test: install-dev              ## the suite, except tests marked slow
	$(PYTEST) $(PARALLEL) -m "not slow"

test-light: install-dev        ## the tests that do not start Ray
	$(PYTEST) $(PARALLEL) -m "not slow and not ray"

test-ray: install-dev          ## the tests that start Ray
	$(PYTEST) -m "not slow and ray"

test-all: install-dev          ## all tests with all repetitions: hours, see CONTRIBUTING.md
	$(PYTEST) $(PARALLEL)

test-numerics: install-dev     ## the numerical tests with the kernels of an older processor
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	    $(PYTEST) $(PARALLEL) -m "light and not slow" $(NUMERICS)

coverage: install-dev          ## branch coverage of `make test`, subprocesses and Ray's workers included: files, then packages
	rm -f .coverage .coverage.*
	COVERAGE_FILE=$(CURDIR)/.coverage $(MAKE) --no-print-directory test PYTEST="$(BIN)/python -m coverage run -m pytest"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --sort=cover
	$(BIN)/python -m tests.support.coverage_table

test-core: install-dev         ## the tests of edt_core, in parallel
	$(PYTEST) $(PARALLEL) -m "not slow and not ray" tests/edt_core

test-pythons:                  ## the tests of edt_core, with each installed version of $(PYTHONS)
	@for version in $(PYTHONS); do \
	    python$$version --version 2>/dev/null || { echo "python$$version is not installed"; continue; }; \
	    $(MAKE) --no-print-directory test-core PYTHON=python$$version VENV=.venv-$$version || exit 1; \
	done

faults: install-dev            ## kills at every step boundary and in every step, double starts, lost nodes and hosts: an hour
	$(PYTEST) -m slow -s tests/pipelines/test_faults.py tests/pipelines/test_lost_nodes.py tests/pipelines/test_hosts.py

check: install-dev prose       ## lint, format, types, prose
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

prose: $(DOCS)/.ready          ## proselint by .proselintrc.json; our own phrases are in tests/docs/test_prose.py
	$(DOCS)/bin/proselint check $(wildcard README.md CONTRIBUTING.md docs/*.md docs/*/*.md examples/*.md examples/*/*.md)

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: install             ## generate docs/config.md from the schemas
	$(BIN)/python -m pipelines.config.reference > docs/config.md

$(DOCS)/.ready: requirements-docs.lock
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python $(INSTALL) --upgrade pip
	$(DOCS)/bin/python $(INSTALL) -r requirements-docs.lock
	touch $@

docs: $(DOCS)/.ready           ## the book, in build/book; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

docs-serve: $(DOCS)/.ready     ## the book on http://127.0.0.1:8000, rebuilt when a page changes
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs serve

docs-version: $(DOCS)/.ready   ## the book as version VERSION, such as 0.1, committed to the branch gh-pages
	PATH=$(CURDIR)/$(DOCS)/bin:$$PATH NO_MKDOCS_2_WARNING=1 mike deploy --update-aliases $(VERSION) latest
	PATH=$(CURDIR)/$(DOCS)/bin:$$PATH mike set-default latest

bench: install-dev             ## times the quickstart, its second run and the CLI; prints a table
	$(BIN)/python tests/benchmarks/quickstart.py

recording: install-dev         ## docs/quickstart-*.svg: the quickstart in a terminal, in a new store
	folder=$$(mktemp -d) && $(BIN)/python tests/docs/recording.py docs/quickstart --title "edt run quickstart" \
	    --hide $$folder/ -- $(BIN)/edt run quickstart --store $$folder/edt-store && rm -r $$folder

wheel: install-dev             ## dist/: the wheel and the source distribution
	$(BIN)/python -m build

notebook: install-dev          ## run the notebook on the results of `make quickstart`, and keep it with its outputs
	$(BIN)/python -m tests.support.notebook

examples: install-dev          ## run the commands of examples/*/README.md, and keep their output; see examples/README.md
	$(BIN)/python -m tests.support.make_examples

FREEZE := .lock-venv/bin/pip freeze --all --exclude edt-pipeline --exclude pip | sed 's/+cpu//' | grep -vE '^(nvidia|cuda|triton)'

lock:                          ## resolve pyproject.toml and write the pins, except those of torch's CUDA packages
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install --quiet .
	$(FREEZE) > requirements.lock
	.lock-venv/bin/pip install --quiet ".[dev]" --constraint requirements.lock
	$(FREEZE) | grep -vxFf requirements.lock > requirements-dev.lock
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" \
	    | .lock-venv/bin/pip install --quiet -r /dev/stdin
	.lock-venv/bin/pip freeze > requirements-docs.lock
	rm -rf .lock-venv

clean:
	rm -rf $(VENV) $(DOCS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

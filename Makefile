# Each target does all of its own set-up: it needs python3 (3.11 or newer), make and nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: install quickstart test test-all faults check format docs lock wheel bench clean

install: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

quickstart: install            ## digits -> shards -> latents -> EDT -> metrics -> registry -> report
	$(BIN)/edt run

test: install                  ## the whole suite but what is marked slow
	$(BIN)/python -m pytest -m "not slow"

test-all: install              ## the slow tests as well
	$(BIN)/python -m pytest

faults: install                ## kills at every step boundary and in every step, double starts, lost nodes: half an hour
	$(BIN)/python -m pytest -m slow -s tests/pipelines/test_faults.py

check: install                 ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install                  ## write the page that is made from the schemas
	$(BIN)/python -m pipelines.config_reference > docs/config.md

bench: install                 ## times the quickstart, its second run and the CLI; prints a table
	$(BIN)/python tests/benchmarks/quickstart.py

wheel: install
	$(BIN)/python -m build --wheel

lock:                          ## resolve pyproject.toml anew and write the pins, but for what torch's CUDA build brings itself
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install --quiet ".[dev]"
	.lock-venv/bin/pip freeze --exclude edt-pipeline | sed 's/+cpu//' | grep -vE '^(nvidia|cuda|triton)' > requirements.lock
	rm -rf .lock-venv

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

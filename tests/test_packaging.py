"""What is distributed: a wheel with the three packages and nothing else, and what it says of itself."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from collections.abc import Iterator, Mapping, Sequence
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipelines.outcome import Outcome
from tests.support.runs import IN_QUERY, IN_URL, URL, digests, digests_of_run, folders, holding
from tests.support.small import CANARY, MODEL, STEPS, environment, options

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("edt_core", "jobs", "pipelines")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
pytestmark = pytest.mark.extern

HEAVY = {"ray", "mlflow", "diffusers", "torch", "transformers", "pyarrow", "matplotlib", "sklearn", "pandas", "numpy"}


def run(*command: str | Path, cwd: Path = ROOT, env: Mapping[str, str] = os.environ) -> str:
    """Standard output of a command in an environment where no package is on the path but those installed."""
    env = {key: value for key, value in env.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel, the wheel made from the sdist, built without a network from a copy of the tree."""
    folder = tmp_path_factory.mktemp("packaging")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "edt-store", "mlruns")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source", cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(contents: dict[str, bytes]) -> Message:
    return message_from_bytes(contents[_info("METADATA")])


def _info(name: str) -> str:
    return f"edt_pipeline-{PROJECT['version']}.dist-info/{name}"


def test_the_wheel_holds_the_packages_whole_and_nothing_else(contents: dict[str, bytes]) -> None:
    """So no test, no test data and no notebook; and no data file of a package that was forgotten in pyproject.toml."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    ours = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert {name for name in contents if not name.startswith(_info(""))} == ours
    for needed in ("edt_core/data/imagenet_classes.txt", "pipelines/configs/quickstart.yaml", "jobs/py.typed"):
        assert needed in ours
    assert any(name.startswith("pipelines/templates/") for name in ours)


def test_the_source_archive_builds_and_has_no_test_data(dist: Path, contents: dict[str, bytes]) -> None:
    (archive,) = dist.glob("*.tar.gz")
    shutil.unpack_archive(archive, dist / "unpacked", filter="data")
    (folder,) = (dist / "unpacked").iterdir()
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in contents if not name.startswith(_info(""))} <= files  # the wheel was built from these
    assert not [name for name in files if name.startswith(("tests/", "notebooks/", "docs/", "examples/"))]


def test_the_metadata_names_extras_versions_and_license(metadata: Message, contents: dict[str, bytes]) -> None:
    assert {"gpu", "s3", "gcs", "postgres", "dinov2", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert contents[_info("licenses/LICENSE")] == (ROOT / "LICENSE").read_bytes()
    classifiers = metadata.get_all("Classifier", [])
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(classifiers)
    assert contents[_info("entry_points.txt")].decode().split("\n")[:2] == [
        "[console_scripts]",
        "edt = pipelines.cli:main",
    ]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel, which sees the libraries of this one and none of this project's files."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, symlinks=True)
    (site,) = (home / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))  # the .pth files in there are not followed
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python")
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel)
    return home


def test_it_installs_and_edt_answers_from_there(installed: Path, tmp_path: Path) -> None:
    home = installed
    python, edt = home / "bin" / "python", home / "bin" / "edt"
    where = run(python, "-c", "import edt_core, jobs, pipelines; print(pipelines.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(home)
    assert "edt" in run(edt, "--help", cwd=tmp_path)
    assert run(edt, "--version", cwd=tmp_path).split() == ["edt", PROJECT["version"]]
    shipped = "from pipelines.config.schema import load_config; print(load_config('quickstart').train.model)"
    assert run(python, "-c", shipped, cwd=tmp_path).split() == ["EDT-Tiny/2"]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For Ray's sockets, whose paths are limited."""
    with tempfile.TemporaryDirectory(prefix="edt-") as folder:
        yield Path(folder)


@pytest.mark.ray
def test_the_installed_edt_runs_a_pipeline_on_ray(
    installed: Path, first: Outcome, store: Path, tmp_path: Path, short_folder: Path
) -> None:
    """The small quickstart in an empty folder, from images to a registered model.

    All that it makes is equal to what the other tests look at, which Ray's calls done in one process made. It has the
    untrained model's three artifacts from there: their steps would only start the same processes again. Secrets of
    environment and configuration are in nothing that it leaves, Ray's logs included.
    """
    home = installed
    untrained = [folder for step, folder in folders().items() if step.startswith("untrained ")]
    for folder in untrained:
        shutil.copytree(store / folder, tmp_path / "edt-store" / folder)
    asked = options(f"inception={{weights: '{URL}', sha256: {'a' * 64}}}")
    env = environment(AWS_SECRET_ACCESS_KEY=CANARY, RAY_TMPDIR=str(short_folder))
    outcome = json.loads(run(home / "bin" / "edt", "run", "--json", *asked, cwd=tmp_path, env=env))
    assert (outcome["status"], outcome["executed"], outcome["failures"]) == ("finished", STEPS - len(untrained), {})
    assert Path(outcome["models"][MODEL]["report"]).is_relative_to(tmp_path)
    code = (
        "import mlflow, sys; mlflow.set_tracking_uri(sys.argv[1]); "
        f"print(mlflow.MlflowClient().get_model_version_by_alias({MODEL!r}, 'champion').version)"
    )
    uri = f"sqlite:///{tmp_path / 'edt-store' / 'mlflow.db'}"
    assert run(home / "bin" / "python", "-c", code, uri, cwd=tmp_path).split()[-1] == "1"
    assert len(untrained) == 3
    assert digests(tmp_path / "edt-store") == digests_of_run(first, store)
    for left in (tmp_path, short_folder):
        assert holding(left, CANARY, IN_URL, IN_QUERY) == []


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    read = dict(re.fullmatch(r"([\w.-]+)==(\S+)", line).groups() for line in lines)  # type: ignore[union-attr]
    return {canonicalize_name(name): version for name, version in read.items()}


def test_every_requirement_is_met_by_the_locks() -> None:
    run, dev = pins("requirements.lock"), pins("requirements-dev.lock")
    assert not run.keys() & dev.keys()
    optional = PROJECT["optional-dependencies"]
    own = Requirement(optional["dev"][0])
    assert own.name == PROJECT["name"]
    extras = [text for extra in own.extras for text in optional[extra]]
    of_run = len(PROJECT["dependencies"])
    for place, text in enumerate([*PROJECT["dependencies"], *optional["dev"][1:], *extras]):
        requirement = Requirement(text)
        version = (run if place < of_run else run | dev).get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is in no lock that it belongs to"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, but {version} is locked"


def imported(statement: str) -> set[str]:
    """Top-level names of all modules that a new Python has after a statement."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import edt_core", sorted(HEAVY)),
        ("import jobs, pipelines", sorted(HEAVY)),
        ("from edt_core import EDTPipeline", ["mlflow", "ray"]),
    ],
)
def test_an_import_brings_no_more_than_it_needs(statement: str, absent: Sequence[str]) -> None:
    """Hence `import edt_core` at once; tests/benchmarks/quickstart.py times it."""
    assert not set(absent) & imported(statement)


def test_what_is_imported_is_seen() -> None:
    assert "numpy" in imported("import edt_core.sampling.grid")

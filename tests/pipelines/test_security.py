"""Secrets end up in no record, and nothing in the packages unpickles, extracts or evaluates what it reads."""

import ast
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.outcome import Outcome
from tests.support.runs import IN_QUERY, IN_URL, URL, holding
from tests.support.small import CANARY, edt, pipeline, start

ROOT = Path(__file__).resolve().parents[2]


def test_secrets_of_environment_and_configuration_are_recorded_nowhere(
    first: Outcome, store: Path, here: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Artifacts, the report, MLflow's database and artifacts, and what is printed.

    Of Ray's logs: tests/test_packaging.py.
    """
    monkeypatch.setenv("MY_SERVICE_TOKEN", "canary-token-77aa")
    config = f"inception={{weights: '{URL}', sha256: {'a' * 64}}}"
    outcome = pipeline(store, config)
    assert outcome.executed == 1  # the report, which prints the configuration
    told = capfd.readouterr()
    canaries = (CANARY, IN_URL, IN_QUERY, "canary-token-77aa")
    assert holding(store, *canaries) == []
    assert not any(canary in told.out + told.err for canary in canaries)
    page = next(iter(outcome.reports.values())).path("report.html").read_text()
    assert "127.0.0.1:9/weights.pth" in page  # the place is told, what opens it is not


@pytest.mark.extern
def test_a_password_in_the_tracking_uri_is_shown_to_nobody() -> None:
    """Of a server that is away: one message with the place and without the password."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://me:{IN_URL}@127.0.0.1:{free.getsockname()[1]}"
        process = start("runs", "--tracking-uri", uri)
        told = process.communicate()[0]
    assert process.returncode == 2, told
    assert told.startswith("error: ")
    assert "Traceback" not in told
    assert IN_URL not in told


def test_weights_that_cannot_be_downloaded_do_not_tell_their_signature(tmp_path: Path, here: None) -> None:
    config = tmp_path / "pipeline.yaml"
    shipped = ROOT / "pipelines" / "configs" / "quickstart.yaml"
    weights = (
        f"extractors: [inception]\ninception: {{weights: '{URL}', sha256: {'a' * 64}}}\npromote: {{metric: fid}}\n"
    )
    config.write_text(shipped.read_text() + weights)
    few = ("--set", "evaluate.allow_rank_deficient=true")  # the digits are too few for FID
    done = edt("run", str(config), "--store", str(tmp_path / "store"), *few)
    told = done.stdout + done.stderr
    assert done.returncode == 2, told
    assert "127.0.0.1:9/weights.pth" in told
    assert "Traceback" not in told
    assert not any(canary in told for canary in (IN_URL, IN_QUERY))
    assert holding(tmp_path / "store", IN_URL, IN_QUERY) == []


PACKAGES = ("edt_core", "jobs", "pipelines")
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "tar.extract", "torch.export.load"}
ALLOWED = {
    "checkpoint_file.py": ["pickle"],  # the name of an error that torch.load raises
    "torch_export.py": ["torch.export.load"],  # of the file that it has just written
    "trials.py": ["cloudpickle"],  # of an error that it has just pickled, to see whether Ray can send it
}
FORBIDDEN_METHODS = {"extractall"}


def unsafe(source: str) -> Iterator[str]:
    """What a module does that could run what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from sorted(FORBIDDEN_IMPORTS & {name.split(".")[0] for name in names})
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in FORBIDDEN_CALLS or called.rpartition(".")[2] in FORBIDDEN_METHODS:
            yield called
        if called == "torch.load" and given.get("weights_only") != "True":
            yield "torch.load"
        if given.get("allow_pickle", "False") != "False":
            yield f"{called}(allow_pickle)"
        if given.get("shell", "False") != "False":
            yield f"{called}(shell)"


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_is_unpickled_extracted_or_evaluated(package: str) -> None:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    found = {path.name: told for path in modules if (told := list(unsafe(path.read_text())))}
    assert {name: told for name, told in found.items() if ALLOWED.get(name) != told} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.export.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "tar.extractall(folder)",
        "yaml.load(text)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_walk_finds_what_is_unsafe(source: str) -> None:
    assert list(unsafe(source))

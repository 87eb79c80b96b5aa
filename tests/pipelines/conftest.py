"""One whole run of the small pipeline, for every test that looks at what a run leaves."""

from pathlib import Path

import pytest

from pipelines.config import load_config
from pipelines.outcome import Outcome
from pipelines.terminal import Terminal
from pipelines.workflows import run
from tests.support.small import SMALL

CANARY = "canary-5e1f0d"


def pipeline(store: Path, *assignments: str) -> Outcome:
    """Run the small pipeline in this process, on the session's Ray."""
    with Terminal() as terminal:
        return run(load_config("quickstart", [*SMALL, *assignments], str(store)), terminal)


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "edt-store"


@pytest.fixture(scope="session")
def first(store: Path, ray_session: None) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return pipeline(store)


@pytest.fixture(autouse=True)
def own_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlflow.set_tracking_uri` sets the variable for all that comes after: a test's own must not reach the next."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

"""What a stranger tries, and what must come of it: one file an attack. docs/security.md lists them with the outcome."""

import pytest


@pytest.fixture(autouse=True)
def own_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlflow.set_tracking_uri` sets the variable for all that comes after: a test's own must not reach the next."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

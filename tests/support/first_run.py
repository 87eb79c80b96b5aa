"""The one whole run of the small pipeline that tests share, also those in several processes of pytest-xdist."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from edt_core.store.artifact import Artifact
from tests.support.local_ray import local_ray_train
from tests.support.small import CANARY, copy_store, pipeline

if TYPE_CHECKING:
    from pipelines.outcome import Outcome


def first_run(store: Path) -> "Outcome":
    """The run, made in this process."""
    with local_ray_train(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return pipeline(store)


def shared_first_run(store: Path, shared: Path) -> "Outcome":
    """The run as it is in the folder `shared` of several processes, copied from there; or made, and copied to there."""
    with FileLock(f"{shared}.lock"):
        record = shared / "outcome.pickle"
        if record.exists():
            copy_store(shared / "store", store)
            maker, outcome = pickle.loads(record.read_bytes())
            return _moved(outcome, maker, store)
        outcome = first_run(store)
        copy_store(store, shared / "store")
        record.write_bytes(pickle.dumps((store, outcome)))
        return outcome


def _moved(outcome: "Outcome", store: Path, to: Path) -> "Outcome":
    """The outcome of a run in one store as that of the same run in another."""
    places = {name: Path(str(report.folder.local)).relative_to(store) for name, report in outcome.reports.items()}
    return replace(
        outcome,
        tracking_uri=outcome.tracking_uri.replace(str(store), str(to)),
        link=outcome.link.replace(str(store), str(to)),
        reports={name: Artifact.open(str(to / place)) for name, place in places.items()},
    )

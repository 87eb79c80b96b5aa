"""What the tests of the pipelines share, beside the one whole run of the small pipeline (tests/conftest.py)."""

from pathlib import Path

import pytest

from pipelines.outcome import Outcome
from tests.support.local_ray import local_ray_train
from tests.support.small import pipeline


@pytest.fixture(scope="session")
def resampled(first: Outcome, store: Path) -> Outcome:
    """The same run with another number of sampling steps: what depends on it ran again, in the same store."""
    with local_ray_train(), pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return pipeline(store, "sample.num_sampling_steps=4")

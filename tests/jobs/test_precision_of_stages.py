"""The precision of every stage whose networks run on a device: float32, whatever the worker's process was set to.

Ray reuses processes, and PyTorch's own default on a GPU is TF32 for convolutions.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edt_core.config import (
    AutoencoderConfig,
    ClassifierConfig,
    EncodeConfig,
    ReferenceConfig,
    SampleConfig,
    Section,
    ValidateConfig,
)
from edt_core.precision import exact_products, use_precision
from edt_core.store.artifact import Artifact
from tests.support.jobs import STAGE_OF, TRAIN, Chain, execute
from tests.support.precision import precisions_of_layers

SAMPLE = SampleConfig(num_samples=4, num_sampling_steps=2, unit_size=4)
STAGES: dict[str, Section] = {
    "autoencoder": AutoencoderConfig(downsample_factor=4, base_channels=8, steps=1, batch_size=8),
    "classifier": ClassifierConfig(steps=1, base_channels=4, feature_dim=8),
    "encode": EncodeConfig(),
    "reference": ReferenceConfig(keep_features=4),
    "train": TRAIN.model_copy(update={"max_steps": 1, "num_workers": 1, "preview_every": 1}),
}


@pytest.fixture(autouse=True)
def _tf32() -> Iterator[None]:
    """A process that computes in TF32 on a GPU, for the time of a test."""
    with exact_products():
        use_precision("tf32")
        yield


@pytest.mark.parametrize("name", STAGES)
def test_networks_of_a_stage_compute_in_float32(name: str, chain: Chain, tmp_path: Path, training_here: None) -> None:
    stage = STAGE_OF[name]
    extras = ("classifier",) if name == "reference" else stage.extras
    inputs = {role: chain[role] for role in (*stage.roles, *extras) if role in chain}
    with precisions_of_layers() as found:
        execute(stage, STAGES[name], tmp_path, None, **inputs)
    assert found == {"ieee"}


def test_sampling_and_validation_compute_in_float32(
    chain: Chain, trained: Artifact, tmp_path: Path, here: None
) -> None:
    models = {role: chain[role] for role in ("autoencoder", "classifier")}
    with precisions_of_layers() as found:
        features = execute(STAGE_OF["sample"], SAMPLE, tmp_path / "features", None, checkpoint=trained, **models)
    assert found == {"ieee"}
    use_precision("tf32")
    judged = {"features": features, "classifier": chain["classifier"], "images": chain["images"]}
    with precisions_of_layers() as found:
        execute(STAGE_OF["validate"], ValidateConfig(), tmp_path / "validation", None, **judged)
    assert found == {"ieee"}

"""The number of images decoded at once: in the counts where it splits a unit, and absent everywhere else."""

from dataclasses import replace
from pathlib import Path

import pytest

from edt_core.autoencoders import parts
from edt_core.config import SampleConfig
from edt_core.evaluation.config import EvaluateConfig
from edt_core.store.artifact import Artifact
from jobs.stages.evaluate import protocol_of
from jobs.stages.sample import decode_record
from tests.support.jobs import STAGE_OF, Chain, execute


def test_sizes_at_which_nothing_changes_have_no_record() -> None:
    assert decode_record(SampleConfig(), 256) == decode_record(SampleConfig(), 32) == {}
    assert decode_record(SampleConfig(unit_size=8), 512) == decode_record(SampleConfig(num_samples=8), 512) == {}
    assert decode_record(SampleConfig(), 512) == {"decoded_at_once": 8}
    assert decode_record(SampleConfig(unit_size=128), 256) == {"decoded_at_once": 64}


def test_samples_state_it_and_stay_comparable(
    chain: Chain, trained: Artifact, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {role: chain[role] for role in ("autoencoder", "classifier")}
    config = SampleConfig(num_samples=6, num_sampling_steps=2, unit_size=6)
    reference = chain["images"]
    reference = replace(
        reference,
        manifest=replace(
            reference.manifest,
            counts={"content": "c", "source": "images", "images": 4},
            config={"keep_features": 4},
        ),
    )
    counts, protocols = {}, {}
    for name, pixels in (("whole", parts._PIXELS), ("parts", 4 * 32**2)):
        monkeypatch.setattr(parts, "_PIXELS", pixels)
        features = execute(STAGE_OF["sample"], config, tmp_path / name, None, checkpoint=trained, **models)
        counts[name] = dict(features.counts)
        protocols[name] = protocol_of(config, EvaluateConfig(), features.counts, reference)
    assert counts["parts"] == {**counts["whole"], "decoded_at_once": 4}
    assert "decoded_at_once" not in counts["whole"]
    assert protocols["parts"] == protocols["whole"]  # a champion that was sampled as a whole can be compared

"""What a change of configuration makes run again: fingerprints alone, without running anything."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edt_core.config import Section
from edt_core.store.artifact import Artifact, Source
from jobs.stages.stage import Stage
from pipelines.config.schema import load_config
from pipelines.engine.step import StepFuture, input_fingerprints
from pipelines.engine.steps import D, Promotion
from pipelines.pipeline import call_steps

SHARED = ["preprocess", "autoencoder", "encode", "classifier", "reference"]
OWN = ["train", "sample", "evaluate"]


@dataclass
class Planned:
    """Stands where a Workflow does and keeps the fingerprint of every step that is called."""

    fingerprints: dict[str, str] = field(default_factory=dict)

    def step(self, name: str, verb: Stage, config: Section, **inputs: StepFuture | Source) -> StepFuture:
        self.fingerprints[name] = verb.fingerprint(config, input_fingerprints(inputs))
        return StepFuture(name, verb.kind, self.fingerprints[name])

    def adopt(self, name: str, stage: Stage, item: Artifact | Source, origin: str) -> StepFuture:
        raise AssertionError(f"{name} was kept")

    def promote(self, promotion: Promotion[D]) -> D | None:
        raise AssertionError(f"{promotion.name} was called with the steps before it")


def plan(*assignments: str, source: str = "s") -> dict[str, str]:
    planned = Planned()
    call_steps(planned, load_config("quickstart", assignments), Source(Path("/data"), source))  # type: ignore[arg-type]
    return {name.replace(" edt-tiny-digits-32", ""): value for name, value in planned.fingerprints.items()}


UNTRAINED = [f"untrained {step}" for step in OWN]


@pytest.mark.parametrize(
    ("assignment", "changed"),
    [
        ("train.max_steps=50", OWN),
        ("train.lr=1e-4", OWN),
        ("train.seed=1", [*OWN, *UNTRAINED]),
        ("sample.cfg_scale=3", ["sample", "evaluate", "untrained sample", "untrained evaluate"]),
        ("evaluate.metrics=[fid]", ["evaluate", "untrained evaluate"]),
        ("classifier.steps=9", ["classifier", "reference", *OWN[1:], *UNTRAINED[1:]]),
        ("autoencoder.seed=4", ["autoencoder", "encode", *OWN, *UNTRAINED]),
        ("preprocess.images_per_shard=100", [*SHARED, *OWN, *UNTRAINED]),
        ("train.num_workers=1", []),
        ("train.checkpoint_every=7", []),
        ("store=/elsewhere", []),
        ("encode.batch_size=3", []),
    ],
)
def test_a_change_reaches_what_hangs_on_it_and_nothing_else(assignment: str, changed: list[str]) -> None:
    before, after = plan(), plan(assignment)
    assert sorted(name for name in before if before[name] != after[name]) == sorted(changed)


def test_other_images_change_everything() -> None:
    before, after = plan(), plan(source="other")
    assert not set(before.values()) & set(after.values())
    assert len(before) == len(SHARED) + 2 * len(OWN)

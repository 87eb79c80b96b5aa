"""The champion that a version was compared with: what changed in the images since, both values, and its samples."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.config import Section
from edt_core.data.sources.delta import ImageDelta, image_delta
from edt_core.errors import UserError
from edt_core.evaluation.references import drift
from edt_core.sampling.labels import trained_classes
from edt_core.store.artifact import Artifact
from edt_core.store.layout import CLASSES_NAME
from edt_core.store.store import Store
from jobs.stages.reuse.labelled import labelled_digests
from pipelines.engine.step import StepFuture
from pipelines.registry.aliases import version_at
from pipelines.registry.gate import Decision
from pipelines.registry.kept import reference_of
from pipelines.report.inputs import read_samples
from pipelines.tracking.catalog import Catalog

IMAGES, FEATURES, REFERENCE = "champion_images", "champion_features", "champion_reference"  # roles of inputs
_CLASSES = 30  # rows of the table
_CHAIN = ("seed", "num_samples", "label_policy")  # fields of sampling that decide which noise and label a sample has

Array = NDArray[Any]


class PredecessorFacts(Section):
    """The facts about the champion that are in no artifact. `value` is None if it could not be compared."""

    version: str
    metric: str
    value: float | None
    measured: str  # "", or how it was measured again


@dataclass(frozen=True)
class ClassChange:
    """A row of the table: images of a class that came and went."""

    name: str
    added: int
    removed: int


@dataclass(frozen=True, eq=False)
class Predecessor:
    """What the report shows of the champion. `samples` [N, S, S, 3] with labels [N] of this version's classes.

    `samples` is None if its images have another size or are gone; `same_noise`: sample i of both has the same noise and
    label; `drift`: Fréchet distance of the images of both in each feature space that they were both measured in.
    """

    facts: PredecessorFacts
    delta: ImageDelta | None
    samples: Array | None = None
    labels: Array | None = None
    same_noise: bool = False
    drift: Mapping[str, float] = field(default_factory=dict)

    @property
    def changes(self) -> list[ClassChange]:
        """The classes with the most changes, in order of their names."""
        if self.delta is None:
            return []
        added, removed = self.delta.added, self.delta.removed
        rows = [ClassChange(name, added.get(name, 0), removed.get(name, 0)) for name in {*added, *removed}]
        largest = sorted(rows, key=lambda row: (-row.added - row.removed, row.name))[:_CLASSES]
        return sorted(largest, key=lambda row: row.name)

    @property
    def hidden_changes(self) -> int:
        """Classes with changes that are not in the table."""
        return 0 if self.delta is None else len({*self.delta.added, *self.delta.removed}) - len(self.changes)


def predecessor_facts(decision: Decision) -> PredecessorFacts | None:
    """The facts about the champion that a decision was made against, or None if there was none."""
    if decision.champion_before is None:
        return None
    again = decision.remeasured
    measured = f"measured again {again.how}" if again is not None and not again.problem else ""
    return PredecessorFacts(
        version=decision.champion_before, metric=decision.metric, value=decision.champion_value, measured=measured
    )


def predecessor_inputs(catalog: Catalog, decision: Decision, store: Store) -> dict[str, StepFuture]:
    """The champion's artifacts for the report, by role; those that are gone are left out."""
    version = None
    if decision.champion_before is not None:
        version = version_at(catalog, decision.name, decision.champion_before)
    if version is None:
        return {}
    images = store.find("images", version.tags.get("edt.images", ""))
    again = decision.remeasured
    features = None
    try:
        evaluation = Artifact.read(again.uri if again is not None and again.uri else version.tags["edt.evaluation.uri"])
        features = store.find("features", evaluation.manifest.inputs["features"])
    except (UserError, OSError, KeyError):
        pass
    artifacts = {
        IMAGES: images,
        FEATURES: features if images is not None else None,
        REFERENCE: reference_of(version, store),
    }
    label = f"version {version.version}"
    return {
        role: StepFuture(label, item.manifest.kind, item.fingerprint, artifact=item)
        for role, item in artifacts.items()
        if item is not None
    }


def read_predecessor(facts: PredecessorFacts, inputs: Mapping[str, Artifact]) -> Predecessor:
    """What the report shows of the champion, as far as its artifacts are there."""
    distances = _drift(inputs)
    if IMAGES not in inputs:
        return Predecessor(facts, None, drift=distances)
    images, before = inputs["images"], inputs[IMAGES]
    delta = image_delta(labelled_digests(before), labelled_digests(images))
    if FEATURES not in inputs or before.counts["image_size"] != images.counts["image_size"]:
        return Predecessor(facts, delta, drift=distances)
    names, old_names = images.read_json(CLASSES_NAME), before.read_json(CLASSES_NAME)
    old = read_samples(inputs[FEATURES], trained_classes(len(old_names), before.counts.get("class_counts")))
    place = {name: label for label, name in enumerate(names)}
    labels = np.array([place.get(old_names[label], -1) for label in old.labels.tolist()], np.int64)
    known = labels >= 0
    chains = (inputs[role].manifest.config for role in (FEATURES, "features"))
    first, second = ([chain.get(name) for name in _CHAIN] for chain in chains)
    same_noise = first == second and names == old_names
    return Predecessor(facts, delta, old.images[known], labels[known], same_noise, distances)


def _drift(inputs: Mapping[str, Artifact]) -> dict[str, float]:
    """The drift since the champion; empty if a reference is missing, or made of published statistics."""
    before, now = inputs.get(REFERENCE), inputs["reference"]
    if before is None or now.counts["source"] != "images" or before.fingerprint == now.fingerprint:
        return {}
    return drift(before, now)

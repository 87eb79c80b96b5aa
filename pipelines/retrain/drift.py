"""Drift: how far the present images are from those of the champion, before a training is paid for.

The measure is the Fréchet distance of the two references in each feature space that both were computed in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edt_core.errors import UserError
from edt_core.evaluation.metrics import frechet_distance
from edt_core.store.artifact import Artifact
from edt_core.store.layout import CLASSES_NAME
from edt_core.store.store import Store
from jobs.models.registry_files import title
from jobs.stages.reference import load_reference
from pipelines.config.schema import PipelineConfig
from pipelines.engine.step import StepFuture
from pipelines.engine.workflow import Workflow
from pipelines.pipeline import HeldBackError

_WAY_ON = "Look at the images; to train on them as they are, add --set retrain.max_drift=null"


@dataclass(frozen=True)
class DriftGuard:
    """Holds a retraining back before its training if the images moved too far from the champion's, or cannot tell."""

    champion: Any  # the registered version
    limit: float  # `retrain.max_drift`

    def __call__(self, workflow: Workflow, shared: Mapping[str, StepFuture]) -> None:
        """Wait for the new reference and compare. Raises HeldBackError."""
        if not workflow.wait(shared["images"], shared["reference"]):
            return  # the failure of a step ends the run by itself
        images, reference = shared["images"].result(), shared["reference"].result()
        drift = self._measured(workflow.store, images, reference)
        workflow.catalog.set_tags(
            workflow.run_id, {f"edt.drift.{space}": repr(value) for space, value in drift.items()}
        )
        text = ", ".join(f"{value:.4g} in the features of {space}" for space, value in drift.items())
        workflow.terminal.say(f"drift     {text or 'not measured'} (at most {self.limit:g})")
        if not drift:
            raise HeldBackError(f"the drift from {title(self.champion)} has no feature space in common. {_WAY_ON}")
        if max(drift.values()) > self.limit:
            raise HeldBackError(
                f"the images drifted from those of {title(self.champion)}: {text}, and retrain.max_drift is "
                f"{self.limit:g}. {_WAY_ON}"
            )

    def _measured(self, store: Store, images: Artifact, reference: Artifact) -> dict[str, float]:
        """The drift in each feature space. Raises HeldBackError if it cannot be measured."""
        if reference.counts["source"] != "images":
            raise HeldBackError(
                "retrain.max_drift is set, but the reference is made of published statistics and not of the images, so "
                f"it shows no drift. {_WAY_ON}"
            )
        before_images, before = self._artifacts(store)
        try:
            self._check_classes(before_images, images)
            return distances(before, reference)
        except (UserError, OSError, ValueError) as error:
            if isinstance(error, HeldBackError):
                raise
            raise HeldBackError(
                f"the drift from {title(self.champion)} cannot be measured: {error}. {_WAY_ON}"
            ) from error

    def _artifacts(self, store: Store) -> tuple[Artifact, Artifact]:
        """The image artifact and the reference of the champion. Raises HeldBackError if they are gone."""
        tags = self.champion.tags
        try:
            evaluation = Artifact.read(store.folder("evaluation", tags["edt.evaluation"]))
            reference = Artifact.open(store.folder("reference", evaluation.manifest.inputs["reference"]))
            return Artifact.read(store.folder("images", tags["edt.images"])), reference
        except (UserError, OSError, KeyError) as error:
            raise HeldBackError(
                f"the drift from {title(self.champion)} cannot be measured: its artifacts are gone ({error}). {_WAY_ON}"
            ) from error

    def _check_classes(self, before: Artifact, now: Artifact) -> None:
        old, new = before.read_json(CLASSES_NAME), now.read_json(CLASSES_NAME)
        gained, lost = [name for name in new if name not in old], [name for name in old if name not in new]
        if gained or lost:
            changes = [f"{word} {', '.join(names[:5])}" for word, names in (("new:", gained), ("gone:", lost)) if names]
            raise HeldBackError(
                f"the classes are not those of {title(self.champion)} ({'; '.join(changes)}), and retrain.max_drift is "
                f"set. {_WAY_ON}"
            )


def drift_guard(config: PipelineConfig, version: Any | None) -> DriftGuard | None:
    """The guard of `retrain.max_drift`; None if it is not set, or there is no champion to compare with."""
    limit = config.retrain.max_drift
    return None if limit is None or version is None else DriftGuard(version, limit)


def distances(before: Artifact, now: Artifact) -> dict[str, float]:
    """Fréchet distance of two references in each feature space that both have from the same network."""
    first, second = before.counts["extractors"], now.counts["extractors"]
    return {
        space: frechet_distance(*(load_reference(item, space).gaussian(name) for name, item in _sides(before, now)))
        for space, digest in second.items()
        if first.get(space) == digest
    }


def _sides(before: Artifact, now: Artifact) -> list[tuple[str, Artifact]]:
    return [("champion's reference", before), ("new reference", now)]

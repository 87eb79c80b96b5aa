"""Drift: how far the present images are from those of the champion, before a training is paid for.

The measure is the Fréchet distance of the two references in each feature space that both were computed in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edt_core.errors import UserError
from edt_core.evaluation.references import drift
from edt_core.store.artifact import Artifact
from edt_core.store.layout import CLASSES_NAME
from edt_core.store.store import Store
from jobs.models.registry_files import title
from pipelines.config.schema import PipelineConfig
from pipelines.engine.step import StepFuture
from pipelines.engine.workflow import Workflow
from pipelines.pipeline import HeldBackError
from pipelines.plan import PlannedStep
from pipelines.registry.kept import reference_of

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
        values = self._measured(workflow.store, images, reference)
        workflow.catalog.set_tags(
            workflow.run_id, {f"edt.drift.{space}": repr(value) for space, value in values.items()}
        )
        text = drift_text(values)
        workflow.terminal.say(f"drift     {text or 'not measured'} (at most {self.limit:g})")
        if not values:
            raise HeldBackError(f"the drift from {title(self.champion)} has no feature space in common. {_WAY_ON}")
        if max(values.values()) > self.limit:
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
            return drift(before, reference)
        except (UserError, OSError, ValueError) as error:
            if isinstance(error, HeldBackError):
                raise
            raise HeldBackError(
                f"the drift from {title(self.champion)} cannot be measured: {error}. {_WAY_ON}"
            ) from error

    def _artifacts(self, store: Store) -> tuple[Artifact, Artifact]:
        """The image artifact and the reference of the champion. Raises HeldBackError if they are gone."""
        images = store.find("images", self.champion.tags.get("edt.images", ""))
        reference = reference_of(self.champion, store)
        for name, artifact in (("images", images), ("reference", reference)):
            if artifact is None:
                raise HeldBackError(
                    f"the drift from {title(self.champion)} cannot be measured: its {name} are not in "
                    f"{store.root.uri}. {_WAY_ON}"
                )
        assert images is not None
        assert reference is not None
        return images, reference

    def _check_classes(self, before: Artifact, now: Artifact) -> None:
        old, new = before.read_json(CLASSES_NAME), now.read_json(CLASSES_NAME)
        gained, lost = [name for name in new if name not in old], [name for name in old if name not in new]
        if gained or lost:
            changes = [f"{word} {', '.join(names[:5])}" for word, names in (("new:", gained), ("gone:", lost)) if names]
            raise HeldBackError(
                f"the classes are not those of {title(self.champion)} ({'; '.join(changes)}), and retrain.max_drift is "
                f"set. {_WAY_ON}"
            )


def planned_drift(version: Any | None, store: Store, steps: Sequence[PlannedStep]) -> dict[str, float]:
    """The drift in each feature space, if the new reference is in the store already, as after a held-back run."""
    new = next((step for step in steps if step.step == "reference" and step.action == "reuse"), None)
    now = None if new is None else store.find(new.kind, new.fingerprint)
    before = None if version is None else reference_of(version, store)
    if now is None or before is None or now.counts["source"] != "images":
        return {}
    return drift(before, now)


def drift_text(values: Mapping[str, float]) -> str:
    """ "0.31 in the features of classifier", with a comma between feature spaces."""
    return ", ".join(f"{value:.4g} in the features of {space}" for space, value in values.items())


def drift_guard(config: PipelineConfig, version: Any | None) -> DriftGuard | None:
    """The guard of `retrain.max_drift`; None if it is not set, or there is no champion to compare with."""
    limit = config.retrain.max_drift
    return None if limit is None or version is None else DriftGuard(version, limit)

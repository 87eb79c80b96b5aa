"""The model that another one was made from, measured beside it: a teacher, or a model before its blocks were cut.

A teacher is measured by its own protocol, and at the student's number of steps; an uncut model by its own protocol. All
are ordinary steps with the reference, the feature networks and the samples of the new version, so that values
differ by the model and its chain alone. What the teacher's own run measured in the same way is reused.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from edt_core.config import ChainConfig, SampleConfig, TrainConfig
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact, Source
from edt_core.store.folder import Folder
from edt_core.store.store import Store
from jobs.models.initial import Initial
from jobs.models.open import Opened, in_store, open_model, use_mlflow
from jobs.runtime.cluster import cause_of
from jobs.stages import evaluate, sample
from pipelines.config.schema import PipelineConfig
from pipelines.engine.step import StepFuture
from pipelines.engine.steps import Steps
from pipelines.registry.distilled.pruned_record import PrunedRecord
from pipelines.registry.distilled.teacher_record import Measurement, TeacherRecord
from pipelines.setup.measured_time import chain_passes
from pipelines.tracking.catalog import Catalog


@dataclass
class OriginMeasurement(ABC):
    """The steps that measure the model that another one was made from, `start`; none if there is nothing to measure.

    `steps` are those of the new model by role.
    """

    config: PipelineConfig
    name: str  # of the new model
    train: TrainConfig
    start: Initial | None
    steps: Mapping[str, StepFuture]
    feature_networks: Mapping[str, StepFuture | Source]
    _evaluations: dict[str, StepFuture] = field(default_factory=dict)
    _problem: str = ""

    def call(self, steps: Steps, catalog: Catalog, artifacts: Mapping[str, Artifact] | None) -> Sequence[StepFuture]:
        """Call the steps. In a plan `artifacts` is None: nothing is fetched or written."""
        chains = self._chains()
        if not chains or self.start is None:
            return ()
        try:
            inputs = self._inputs(self.start, fetch=artifacts is not None)
        except (UserError, OSError) as error:
            self._problem = str(error)
            return ()
        called: list[StepFuture] = []
        for label, config in chains.items():
            features = steps.step(f"sample {label} {self.name}", sample.STAGE, config, **inputs)
            compared = {"features": features, "reference": self.steps["reference"]}
            evaluation = steps.step(f"evaluate {label} {self.name}", evaluate.STAGE, self.config.evaluate, **compared)
            self._evaluations[label] = evaluation
            called += [features, evaluation]
        return called

    @abstractmethod
    def _chains(self) -> dict[str, SampleConfig]:
        """How the model is sampled, by the label of the steps; empty if it is not to be measured."""

    def _measurements(self) -> dict[str, Measurement]:
        """What came of the steps, by label. Raises UserError if one failed for a reason that a rerun would meet again.

        Of a lost worker or a full disk a rerun may know nothing: no decision rests on it.
        """
        if not self._evaluations:
            raise UserError(self._problem)
        chains = self._chains()
        try:
            return {label: self._measurement(chains[label], step.result()) for label, step in self._evaluations.items()}
        except Exception as error:
            cause = cause_of(error)
            if not isinstance(cause, UserError):
                raise
            raise UserError(str(cause)) from error

    def _measurement(self, chain: SampleConfig, evaluation: Artifact) -> Measurement:
        from edt_core.diffusion import objective_of

        a_chain = objective_of(self.train.objective).calls(chain.sampler, chain.num_sampling_steps)
        return Measurement(
            sampler=chain.sampler,
            steps=chain.num_sampling_steps,
            calls=a_chain * (1 if chain.cfg_scale == 1.0 else 2),
            metrics={name: float(value) for name, value in evaluation.counts["metrics"].items()},
            evaluation=evaluation.fingerprint,
            uri=evaluation.folder.uri,
        )

    def _inputs(self, start: Initial, fetch: bool) -> dict[str, StepFuture | Source]:
        """The inputs of the teacher's samples: its artifacts in the store, or else made of its registered folder."""
        opened = _in_store(start, Store(Folder.at(self.config.store)))
        if opened is None and not fetch:
            folder = Source(start.location, start.fingerprint)
            return {"checkpoint": folder, "autoencoder": folder, **self.feature_networks}
        opened = opened or _fetched(start, self.config.store)
        if opened.autoencoder is None:
            raise UserError(f"{start.location} has no autoencoder beside it")
        parts = {"checkpoint": opened.checkpoint, "autoencoder": opened.autoencoder}
        own = {role: StepFuture(start.location, role, part.fingerprint, artifact=part) for role, part in parts.items()}
        return {**own, **self.feature_networks}


class TeacherMeasurement(OriginMeasurement):
    """The steps that measure the teacher of a model; none of a model that was not distilled."""

    def result(self) -> TeacherRecord | None:
        """What came of the steps; None if none was needed. A failure is a `problem`, not an error."""
        if self.train.distill is None or self.start is None:
            return None
        try:
            few, own = self._measurements().values()
        except UserError as error:
            return TeacherRecord(self.start.location, problem=str(error))
        return TeacherRecord(self.start.location, few=few, own=own)

    def _chains(self) -> dict[str, SampleConfig]:
        """In few steps, then by its own protocol."""
        settings = self.train.distill
        if settings is None:
            return {}
        few = settings.teacher.model_copy(update={"num_sampling_steps": settings.steps})
        chains: dict[str, ChainConfig] = {"few-step teacher": few, "teacher": settings.protocol or settings.teacher}
        return {label: self.config.sample.model_copy(update=dict(chain)) for label, chain in chains.items()}


class UncutMeasurement(OriginMeasurement):
    """The steps that measure the model before its blocks were cut; none of a model that was not pruned."""

    def result(self) -> PrunedRecord | None:
        """What came of the steps beside what is known of the cut; None if none was needed."""
        if self.start is None or "pruning" not in self.steps:
            return None
        cut = self.steps["pruning"].result().counts["pruned"]
        record = partial(PrunedRecord.of_cut, self.start.location, cut, chain_passes(self.config.sample, self.train))
        try:
            (own,) = self._measurements().values()
        except UserError as error:
            return record(problem=str(error))
        return record(metrics=dict(own.metrics), evaluation=own.evaluation, uri=own.uri)

    def _chains(self) -> dict[str, SampleConfig]:
        """Its own protocol: that of the new version, with AMM in the blocks that it had it in."""
        prune, chain = self.config.prune, self.config.sample
        if prune.keep is None:
            return {}
        blocks = prune.uncut_amm_blocks
        return {"uncut": chain if blocks is None else chain.model_copy(update={"amm_blocks": blocks})}


def _in_store(start: Initial, store: Store) -> Opened | None:
    """The teacher's checkpoint artifact with its autoencoder, if they are in the store and it has these weights."""
    known = None if start.averaged or start.checkpoint is None else store.find("checkpoint", start.checkpoint)
    if known is None:
        return None
    opened = in_store(known)
    return None if opened.autoencoder is None else opened


def _fetched(start: Initial, store: str) -> Opened:
    """The teacher as artifacts in the store, from wherever it is. MLflow's own setting is left as it was."""
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    try:
        use_mlflow(start.location, start.tracking_uri, store)
        return open_model(start.location, Folder.at(store))
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None forgets it

"""The plan of a run, before anything runs: whether each step is reused, run or resumed, and why."""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from edt_core.config import PreprocessConfig, Section, TrainConfig, result_fields
from edt_core.store.artifact import Artifact, Source
from edt_core.store.folder import Folder
from edt_core.store.layout import CHECKPOINT_MANIFEST, CHECKPOINTS
from edt_core.store.manifest import Manifest
from edt_core.store.store import Store
from jobs.stages.stage import Stage
from pipelines.config.schema import PipelineConfig
from pipelines.config.size_check import check_pipeline_sizes
from pipelines.engine.step import StepFuture, input_fingerprints, needs_of
from pipelines.engine.steps import D, Promotion
from pipelines.setup.duration import Work, expected_seconds
from pipelines.tracking.catalog import Catalog, flatten

Action = Literal["reuse", "resume", "run"]
_SHOWN = 3  # differences
_LONGEST = 80  # characters of a difference


@dataclass(frozen=True)
class PlannedStep:
    """One step of a planned run. `run_id`: the MLflow run that produced the reused artifact.

    `seconds`: of a step that runs, at the pace of an earlier artifact like it; None if there is none.
    """

    step: str
    kind: str
    fingerprint: str
    action: Action
    why: str
    run_id: str | None = None
    seconds: float | None = None

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Planner:
    """Takes the same calls as a Workflow, but runs no step.

    `catalog`: the MLflow with the registered models; None if there is none yet.
    """

    store: Store
    catalog: Catalog | None = None
    steps: dict[str, PlannedStep] = field(default_factory=dict)
    _manifests: dict[str, list[Manifest]] = field(default_factory=dict)  # kind -> those in the store, newest first
    _models: dict[str, str] = field(default_factory=dict)  # training -> its model
    _images: tuple[int | None, int | None] = (None, None)  # number and side of the images

    def step(self, name: str, stage: Stage, config: Section, **inputs: StepFuture | Source) -> StepFuture:
        """Plan one step. Raises UserError if a run would."""
        self._note(name, config, inputs)
        fingerprints = input_fingerprints(inputs)
        fingerprint = stage.fingerprint(config, fingerprints)
        warnings: list[str] = []
        artifact = self.store.find(stage.kind, fingerprint, warnings.append)
        if artifact is not None:
            stage.accept(config, artifact.counts)
            manifest = artifact.manifest
            why = f"made {manifest.created_at} in {manifest.duration_s:.0f} s"
            planned = PlannedStep(name, stage.kind, fingerprint, "reuse", why, manifest.mlflow_run_id)
        else:
            finished = progress_of(self.store.begun(stage.kind, fingerprint))
            finished = finished or self._continued(stage, config, inputs, fingerprint)
            why = warnings[0] if warnings else self._why(stage, config, fingerprints)
            action: Action = "resume" if finished else "run"
            if isinstance(initial := inputs.get("init"), Source):
                why += f"; it starts from {initial.location}"
            seconds = self._seconds(stage.kind, config, inputs) if not finished else None
            why = f"{finished}; {why}" if finished else why
            planned = PlannedStep(name, stage.kind, fingerprint, action, why, seconds=seconds)
        self.steps[name] = planned
        return StepFuture(name, stage.kind, fingerprint, needs_of(inputs), artifact=artifact)

    def adopt(self, name: str, stage: Stage, item: Artifact | Source, origin: str) -> StepFuture:
        """Plan to take a finished artifact as it is."""
        assert isinstance(item, Artifact), name
        why = f"of {origin}, made {item.manifest.created_at}"
        self.steps[name] = PlannedStep(name, stage.kind, item.fingerprint, "reuse", why, item.manifest.mlflow_run_id)
        return StepFuture(name, stage.kind, item.fingerprint, (origin,), artifact=item)

    def _continued(
        self, stage: Stage, config: Section, inputs: Mapping[str, StepFuture | Source], fingerprint: str
    ) -> str:
        existing = {role: i.artifact for role, i in inputs.items() if isinstance(i, StepFuture) and i.artifact}
        folder = self.store.folder(stage.kind, fingerprint)
        return stage.continued(folder, config, input_fingerprints(inputs), existing)

    def promote(self, promotion: Promotion[D]) -> D | None:
        """The recorded decision about the branch, if all artifacts that it depends on exist; else None."""
        previous = None
        if self.catalog is not None and all(step.reused for step in promotion.named.values()):
            previous = promotion.find(self.catalog, {role: step.result() for role, step in promotion.named.items()})
        if previous is None:
            if self.catalog is not None:
                promotion.compare(self, self.catalog, None)
            why = "no version of this checkpoint and evaluation is registered"
            self.steps[promotion.name] = PlannedStep(promotion.name, "version", "", "run", why)
            self.steps[promotion.then] = PlannedStep(promotion.then, "report", "", "run", "it follows the promotion")
            return None
        decision, run_id = previous
        why = f"version {decision.version}"
        self.steps[promotion.name] = PlannedStep(promotion.name, "version", "", "reuse", why, run_id)
        return decision

    def _note(self, name: str, config: Section, inputs: Mapping[str, StepFuture | Source]) -> None:
        """Remember what decides the pace of later steps: number and size of the images, and the models."""
        if isinstance(config, TrainConfig):
            self._models[name] = config.model
        if isinstance(config, PreprocessConfig):
            source = inputs.get("source")
            self._images = (source.images if isinstance(source, Source) else None, config.image_size)

    def _seconds(self, kind: str, config: Section, inputs: Mapping[str, StepFuture | Source]) -> float | None:
        checkpoint = inputs.get("checkpoint")
        model = self._models.get(checkpoint.name) if isinstance(checkpoint, StepFuture) else None
        model = config.model if isinstance(config, TrainConfig) else model
        return expected_seconds(Work(kind, config, *self._images, model), self._newest(kind))

    def _newest(self, kind: str) -> list[Manifest]:
        """The manifests of a kind, newest first."""
        if kind not in self._manifests:
            self._manifests[kind] = in_order(self.store.manifests(kind))[::-1]
        return self._manifests[kind]

    def _why(self, stage: Stage, config: Section, inputs: Mapping[str, str]) -> str:
        """How the step differs from the most similar artifact of its kind."""
        parents = {role: value for role, value in inputs.items() if role not in stage.extras}
        fields = flatten(result_fields(config))
        candidates = [differences(m, fields, parents, stage.version) for m in self._newest(stage.kind)]
        if not candidates:
            return "not made yet"
        nearest = min(candidates, key=len)
        more = f" and {len(nearest) - _SHOWN} more" if len(nearest) > _SHOWN else ""
        return (", ".join(nearest[:_SHOWN]) or "the artifact is gone") + more


def plan(
    config: PipelineConfig,
    catalog: Catalog | None = None,
    digest_again: bool = False,
    source: Source | None = None,
) -> list[PlannedStep]:
    """Plan every step, in the order of the calls, and the promotion of each model. Writes nothing.

    `catalog`: the MLflow of the run; None if there is none yet. `digest_again`: read every image, even if its digest is
    cached. `source`: the images, if they have been listed already.

    Raises UserError if the source or published weights are missing.
    """
    from pipelines.pipeline import Published, call_promotion, call_steps, prepare_source
    from pipelines.terminal.terminal import Terminal

    store = Store(Folder.at(config.store))
    planner = Planner(store, catalog)
    with tempfile.TemporaryDirectory() as folder, Terminal(to_stderr=True) as terminal:
        source = source or prepare_source(config.source, Folder.at(folder), terminal, digest_again)
        published = Published.of(config, catalog.tracking_uri if catalog else None, store, source.classes)
        check_pipeline_sizes(config, source.images, published.statistics)
        for branch in call_steps(planner, config, source, published):
            call_promotion(planner, config, branch)
    return list(planner.steps.values())


def in_order(manifests: Mapping[str, Manifest]) -> list[Manifest]:
    """Manifests by creation time, newest last."""
    return sorted(manifests.values(), key=lambda manifest: manifest.created_at)


def differences(manifest: Manifest, fields: Mapping[str, Any], inputs: Mapping[str, str], version: int) -> list[str]:
    """In which fields and inputs a planned artifact differs from an existing one, as `lr 0.001 -> 0.002`."""
    before = flatten(manifest.config)
    changes = [_change(key, before.get(key), value) for key, value in fields.items() if before.get(key) != value]
    changes += [_change(key, value, "nothing") for key, value in before.items() if key not in fields]
    roles = sorted({*inputs, *manifest.inputs})
    changes += [f"other {role}" for role in roles if inputs.get(role) != manifest.inputs.get(role)]
    if manifest.step_version != version:
        changes.append(f"step version {manifest.step_version} -> {version}")
    return changes


def _change(key: str, before: Any, after: Any) -> str:
    change = f"{key} {before} -> {after}"
    return change if len(change) <= _LONGEST and "\n" not in change else f"another {key}"


def progress_of(files: Iterable[str]) -> str:
    """What earlier attempts have finished, as text; "" for nothing."""
    names = sorted(name for name in files if not name.startswith("."))
    checkpoints = [
        Path(n).parent.name for n in names if n.startswith(f"{CHECKPOINTS}/") and n.endswith(CHECKPOINT_MANIFEST)
    ]
    if checkpoints:
        return f"from {checkpoints[-1]}"
    return f"{len(names)} finished files are reused" if names else ""

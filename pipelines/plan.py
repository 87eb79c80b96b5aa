"""What a run would do, told before anything runs: reuse, run or resume each step, and why."""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from edt_core.config import Section, result_fields
from edt_core.store.artifact import Source
from edt_core.store.folder import Folder
from edt_core.store.layout import CHECKPOINT_MANIFEST, CHECKPOINTS
from edt_core.store.manifest import Manifest
from edt_core.store.store import Store
from jobs.stages.stage import Stage
from pipelines.config.schema import PipelineConfig
from pipelines.config.size_check import check_pipeline_sizes
from pipelines.engine.step import StepFuture, input_fingerprints, needs_of
from pipelines.engine.steps import D, Promotion
from pipelines.tracking.catalog import Catalog, flatten

Action = Literal["reuse", "resume", "run"]
_SHOWN = 3  # differences that are named
_LONGEST = 80  # characters of a difference that is shown


@dataclass(frozen=True)
class PlannedStep:
    """One step of a run that has not begun. `run_id`: the MLflow run that made what is reused."""

    step: str
    kind: str
    fingerprint: str
    action: Action
    why: str
    run_id: str | None = None

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Planner:
    """Stands where a Workflow does: takes the calls of the steps and runs none.

    `catalog`: the MLflow that knows what is registered; None where there is none yet.
    """

    store: Store
    catalog: Catalog | None = None
    steps: dict[str, PlannedStep] = field(default_factory=dict)
    _made: dict[str, list[Manifest]] = field(default_factory=dict)  # kind -> manifests in the store, newest last

    def step(self, name: str, stage: Stage, config: Section, **inputs: StepFuture | Source) -> StepFuture:
        """Find out what a run would do with this step. Raises UserError where it would refuse."""
        fingerprints = input_fingerprints(inputs)
        fingerprint = stage.fingerprint(config, fingerprints)
        warnings: list[str] = []
        found = self.store.find(stage.kind, fingerprint, warnings.append)
        if found is not None:
            stage.accept(config, found.counts)
            made = found.manifest
            why = f"made {made.created_at} in {made.duration_s:.0f} s"
            planned = PlannedStep(name, stage.kind, fingerprint, "reuse", why, made.mlflow_run_id)
        else:
            finished = progress_of(self.store.begun(stage.kind, fingerprint))
            why = warnings[0] if warnings else self._why(stage, config, fingerprints)
            action: Action = "resume" if finished else "run"
            planned = PlannedStep(name, stage.kind, fingerprint, action, f"{finished}; {why}" if finished else why)
        self.steps[name] = planned
        return StepFuture(name, stage.kind, fingerprint, needs_of(inputs), artifact=found)

    def promote(self, promotion: Promotion[D]) -> D | None:
        """Find out what was decided of the branch: known where all that it rests on is made."""
        found = None
        if self.catalog is not None and all(step.reused for step in promotion.named.values()):
            found = promotion.find(self.catalog, {role: step.result() for role, step in promotion.named.items()})
        if found is None:
            why = "no version of this checkpoint and evaluation is registered"
            self.steps[promotion.name] = PlannedStep(promotion.name, "version", "", "run", why)
            self.steps[promotion.then] = PlannedStep(promotion.then, "report", "", "run", "it follows the promotion")
            return None
        decided, run_id = found
        why = f"version {decided.version}"
        self.steps[promotion.name] = PlannedStep(promotion.name, "version", "", "reuse", why, run_id)
        return decided

    def _why(self, stage: Stage, config: Section, inputs: Mapping[str, str]) -> str:
        """What differs from the artifact of this kind that comes nearest."""
        if stage.kind not in self._made:
            self._made[stage.kind] = in_order(self.store.manifests(stage.kind))
        counted = {role: value for role, value in inputs.items() if role not in stage.extras}
        wanted = flatten(result_fields(config))
        told = [differences(made, wanted, counted, stage.version) for made in reversed(self._made[stage.kind])]
        if not told:
            return f"no {stage.kind} was made here before"
        nearest = min(told, key=len)
        more = f" and {len(nearest) - _SHOWN} more" if len(nearest) > _SHOWN else ""
        return (", ".join(nearest[:_SHOWN]) or "the artifact is gone") + more


def plan(config: PipelineConfig, catalog: Catalog | None = None) -> list[PlannedStep]:
    """Every step, in the order in which they are called, and the promotion of each model. Writes nothing.

    `catalog`: the MLflow of the run, None where it has none yet. Raises UserError for a source or published weights
    that are not there.
    """
    from pipelines.pipeline import Published, call_promotion, call_steps, prepare_source
    from pipelines.terminal.terminal import Terminal

    store = Store(Folder.at(config.store))
    planner = Planner(store, catalog)
    with tempfile.TemporaryDirectory() as folder, Terminal(to_stderr=True) as terminal:
        source = prepare_source(config.source, Folder.at(folder), terminal)
        published = Published.of(config, catalog.tracking_uri if catalog else None)
        check_pipeline_sizes(config, source.images, published.statistics)
        for branch in call_steps(planner, config, source, published):
            call_promotion(planner, config, branch)
    return list(planner.steps.values())


def in_order(found: Mapping[str, Manifest]) -> list[Manifest]:
    """Manifests by the time that they state, newest last."""
    return sorted(found.values(), key=lambda manifest: manifest.created_at)


def differences(made: Manifest, wanted: Mapping[str, Any], inputs: Mapping[str, str], version: int) -> list[str]:
    """In which fields and inputs a wanted artifact differs from one that was made: `lr 0.001 -> 0.002`."""
    there = flatten(made.config)
    told = [_change(key, there.get(key), value) for key, value in wanted.items() if there.get(key) != value]
    told += [_change(key, value, "nothing") for key, value in there.items() if key not in wanted]
    told += [f"other {role}" for role in sorted({*inputs, *made.inputs}) if inputs.get(role) != made.inputs.get(role)]
    if made.step_version != version:
        told.append(f"step version {made.step_version} -> {version}")
    return told


def _change(key: str, before: Any, after: Any) -> str:
    change = f"{key} {before} -> {after}"
    return change if len(change) <= _LONGEST and "\n" not in change else f"another {key}"


def progress_of(files: Iterable[str]) -> str:
    """What earlier attempts have finished, in words; "" for nothing."""
    names = sorted(files)
    checkpoints = [
        Path(n).parent.name for n in names if n.startswith(f"{CHECKPOINTS}/") and n.endswith(CHECKPOINT_MANIFEST)
    ]
    if checkpoints:
        return f"from {checkpoints[-1]}"
    return f"{len(names)} finished files are taken over" if names else ""

"""What the store has of a table's rows: metrics of each training, costs, and the artifacts that figures are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edt_core.config import TrainConfig
from edt_core.models import macs_of
from edt_core.printing.redaction import redacted
from edt_core.sampling.sampler import resolved_amm_blocks
from edt_core.store.artifact import Artifact, Source
from edt_core.store.store import Store
from edt_core.training.start.trainable import step_flops
from jobs.stages.train import history
from pipelines.config.schema import PipelineConfig
from pipelines.pipeline import Published, call_steps, prepare_source
from pipelines.pipeline.branches import Branch
from pipelines.plan import Planner
from pipelines.studies.paper.pipelines import registered_name
from pipelines.studies.paper.table import Scale, Table
from pipelines.terminal.terminal import Terminal


@dataclass(frozen=True)
class RowResult:
    """One row of a table as it was measured.

    `trainings`: the metrics of each finished training by seed. `macs`: multiply-accumulates of a forward pass of one
    image. `training_flops`: of one training. `blocks`: their number; `amm_blocks`: those that are modulated.
    `artifacts`: those of the first training by role, as far as they exist.
    """

    name: str
    label: str
    macs: int
    training_flops: float
    blocks: int
    amm_blocks: tuple[int, ...]
    published: Mapping[str, float]
    trainings: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    seeds: int = 1
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)

    def missing(self) -> int:
        """The trainings that are not measured yet."""
        return self.seeds - len(self.trainings)


@dataclass(frozen=True)
class Results:
    """A table as it was measured, and what all its rows have in common."""

    table: Table
    name: str
    scale: Scale
    rows: Sequence[RowResult]
    setting: Mapping[str, Any]
    metric: str  # that decides
    lower_is_better: bool

    @property
    def base(self) -> str:
        return self.table.base

    def of_one_training(self) -> set[str]:
        """The rows whose trainings are those of the base, sampled in another way."""
        trained = {
            row.name: row.artifacts["checkpoint"].fingerprint for row in self.rows if "checkpoint" in row.artifacts
        }
        return {name for name, identity in trained.items() if identity == trained.get(self.base) and name != self.base}

    def missing(self) -> int:
        """The trainings that are not measured yet."""
        return sum(row.missing() for row in self.rows)


def results_of(table: Table, name: str, scale: Scale, configs: Sequence[PipelineConfig], terminal: Terminal) -> Results:
    """The results of a table from the artifacts in its store, without computing any."""
    rows: dict[str, RowResult] = {}
    settings: list[dict[str, Any]] = []
    for config in configs:
        store = Store.open(config.store)
        source = prepare_source(config.source, store.root, terminal)
        published = Published.of(config, None, store, source.classes)
        for branch in call_steps(Planner(store), config, source, published):
            rows[branch.name] = _row(table, config, branch, scale, source)
            facts = {"images": source.images, "classes": len(source.classes)}
            settings.append({**facts, **_setting(config, branch.train)})
    ordered = [rows[registered_name(row, scale)] for row in table.rows_at(scale)]
    equal = {name: all(each[name] == value for each in settings) for name, value in settings[0].items()}
    setting = {name: value if equal[name] else "by row" for name, value in settings[0].items()}
    return Results(table, name, scale, ordered, setting, configs[0].promote.metric, configs[0].promote.lower_is_better)


def losses_correlation(row: RowResult) -> float | None:
    """The correlation of the changes of both losses of a row's first training; None without a masked loss."""
    rows = history(row.artifacts["checkpoint"]) if "checkpoint" in row.artifacts else []
    pairs = [
        (entry["loss_full"], entry["loss_masked"]) for entry in rows if {"loss_full", "loss_masked"} <= entry.keys()
    ]
    if len(pairs) < 3:
        return None
    full, masked = (np.diff(np.array(column)) for column in zip(*pairs, strict=True))
    return float(np.corrcoef(full, masked)[0, 1]) if full.std() and masked.std() else None


def _row(table: Table, config: PipelineConfig, branch: Branch, scale: Scale, source: Source) -> RowResult:
    row_name = branch.name.removeprefix(registered_name("", scale))
    row, train = table.rows[row_name], branch.train
    classes = len(source.classes)
    model = config.model_of(branch.name, classes)
    images = train.total_steps(source.images or 0) * train.global_batch_size
    evaluations = branch.evaluations() or {train.seed: branch.steps["evaluation"]}
    steps = {**branch.steps, **branch.beside}
    return RowResult(
        name=row_name,
        label=row.label,
        macs=macs_of(model),
        blocks=model.num_blocks,
        amm_blocks=resolved_amm_blocks(config.sample, model),
        training_flops=float(images * step_flops(train, model)),
        published=row.published,
        trainings={
            seed: step.artifact.counts["metrics"] for seed, step in evaluations.items() if step.artifact is not None
        },
        seeds=len(evaluations),
        artifacts={role: step.artifact for role, step in steps.items() if step.artifact is not None},
    )


def _setting(config: PipelineConfig, train: TrainConfig) -> dict[str, Any]:
    """What a reader needs to know of a row; what is equal in all rows is shown."""
    sample = config.sample
    return {
        "source": config.source.kind if config.source.path is None else redacted(config.source.path),
        "image_size": config.preprocess.image_size,
        "steps": train.max_steps if train.max_epochs is None else f"of {train.max_epochs:g} epochs",
        "global_batch_size": train.global_batch_size,
        "objective": train.objective,
        "optimizer": train.optimizer,
        "num_samples": sample.num_samples,
        "num_sampling_steps": sample.num_sampling_steps,
        "cfg_scale": sample.cfg_scale,
    }

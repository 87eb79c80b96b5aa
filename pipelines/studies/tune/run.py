"""A search as a run of a workflow: the ordinary data steps, then the trials by Ray Tune, then what they found."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

from edt_core.config import TrainConfig
from edt_core.data.holdout import LEAST_HELD_OUT
from edt_core.errors import DivergedError, UserError
from edt_core.store.artifact import Artifact, Source
from edt_core.store.store import Store
from edt_core.training.validation.overfitting import HELD_OUT_LOSS
from jobs.runtime.failure import explained
from jobs.stages import train
from jobs.stages.train import history
from pipelines.config.schema import PipelineConfig
from pipelines.config.size_check import training_problems
from pipelines.engine.step import StepFuture
from pipelines.engine.steps import Steps
from pipelines.engine.workflow import Workflow
from pipelines.outcome import Outcome
from pipelines.pipeline import Published, Work, call_data, prepare_source, record_steps, run
from pipelines.plan import PlannedStep, Planner
from pipelines.studies.tune.result import Ended, Results, Row
from pipelines.studies.tune.search import Search, Trial
from pipelines.studies.tune.trials import Trials, TrialWorkflow, loss_of, room_at_once
from pipelines.terminal.terminal import Terminal
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import SEARCH_TAG


def step_name(trial: Trial) -> str:
    """The name of a trial's step."""
    return f"train {trial.name}"


def plan_search(
    search: Search, terminal: Terminal, catalog: Catalog | None = None
) -> tuple[dict[str, PlannedStep], Source]:
    """Which data steps and trials a search would reuse, resume or run, by step, and its images. Creates no store.

    `catalog`: the MLflow of the store, if there is one. Raises UserError if the images are missing, or none is held
    out.
    """
    import tempfile

    from edt_core.store.folder import Folder

    config = search.config
    store = Store(Folder.at(config.store))
    with tempfile.TemporaryDirectory() as folder:
        source = prepare_source(config.source, Folder.at(folder), terminal)
        check_trials(config, source.images)
        planner = Planner(store)
        published = Published.of(config, catalog.tracking_uri if catalog else None, store, source.classes)
        _call_trials(planner, search, source, call_data(planner, config, source, published))
    return planner.steps, source


def run_search(
    search: Search, terminal: Terminal, address: str | None = None, at_once: int | None = None
) -> tuple[Outcome, Results | None]:
    """Run the trials that the store does not have, at most `at_once` together. No results if the run was stopped.

    Failures of trials are in the outcome and in the results. Raises UserError before anything is computed.
    """
    made = _SearchRun(search, at_once)
    work = Work(made.call, TrialWorkflow, "search.yaml", check_trials)
    outcome = run(search.config, terminal, address, work=work)
    return outcome, None if outcome.stopped or not made.rows else Results(search, tuple(made.rows))


def record_results(outcome: Outcome, results: Results, folder: Path, names: Sequence[str], digest: str) -> None:
    """Add the files of the results, and the best trial, to the search's run in MLflow."""
    catalog, best = Catalog(outcome.tracking_uri, ""), results.best
    for name in names:
        catalog.client.log_artifact(outcome.run_id, str(folder / name))
    values = {} if best is None else {f"edt.best.{field}": str(value) for field, value in best.trial.point.items()}
    catalog.set_tags(outcome.run_id, {"edt.search.digest": digest, **values})
    counts = {"trials": len(results.rows), "diverged": len(results.of("diverged")), "failed": len(results.of("failed"))}
    loss = {} if best is None or best.loss is None else {f"best_{HELD_OUT_LOSS}": best.loss}
    catalog.log_metrics(outcome.run_id, {**counts, **loss})


@dataclass
class _SearchRun:
    """The work of a search's run, and the rows that it leaves."""

    search: Search
    at_once: int | None
    rows: list[Row] = field(default_factory=list)

    def call(
        self, workflow: Workflow, config: PipelineConfig, source: Source, published: Published, outcome: Outcome
    ) -> None:
        """Make the latents, then run all trials."""
        assert isinstance(workflow, TrialWorkflow)
        workflow.catalog.set_tags(workflow.run_id, {SEARCH_TAG: self.search.model})
        shared = call_data(workflow, config, source, published)
        if not workflow.wait(*shared.values()):
            return
        workflow.trials = Trials()
        try:
            futures = _call_trials(workflow, self.search, source, shared)
            record_steps(workflow)
            if not all(future.reused for future in futures.values()):
                workflow.trials.start(self._at_once(config.train))
            workflow.wait(*futures.values())
        finally:
            workflow.trials.close()
        artifacts = workflow.artifacts()
        for trial in self.search.trials:
            name = step_name(trial)
            self.rows.append(_row(trial, artifacts.get(name), workflow.failures.get(name)))

    def _at_once(self, recipe: TrainConfig) -> int:
        workers = recipe.worker_range[0]
        return room_at_once(workers, recipe.num_cpus_per_worker, float(recipe.use_gpu), self.at_once)


def _call_trials(steps: Steps, search: Search, source: Source, shared: dict[str, StepFuture]) -> dict[str, StepFuture]:
    """Call the training of each trial. It has the fingerprint of any other training with these fields."""
    return {
        trial.name: steps.step(
            step_name(trial), train.STAGE, search.config.train_of(trial.name).settled(source.images), **shared
        )
        for trial in search.trials
    }


def check_trials(config: PipelineConfig, images: int | None, statistics: Source | None = None) -> None:
    """Raise UserError if trials could not be trained, or would have no held-out loss to be compared by."""
    if problems := training_problems(config, images):
        raise UserError("\n".join(problems))
    if not config.train.settled(images).holdout_share:
        count = "the images" if images is None else f"the {images:,} images"
        raise UserError(
            f"train.holdout is {config.train.holdout}, so none of {count} is held out, but trials are compared by the "
            f"loss on held-out images; set it to a share of at least {LEAST_HELD_OUT} images, such as --set "
            "train.holdout=0.1"
        )


def _row(trial: Trial, checkpoint: Artifact | None, error: BaseException | None) -> Row:
    """How one trial ended."""
    if checkpoint is None:
        assert error is not None, trial.name
        ended: Ended = "diverged" if isinstance(error, DivergedError) else "failed"
        return Row(trial, ended, problem=explained(error).cause)
    loss = loss_of(checkpoint)
    if loss is None or not isfinite(loss):
        return Row(trial, "diverged", checkpoint=checkpoint.fingerprint, problem=f"its held-out loss is {loss}")
    return Row(trial, "finished", loss, checkpoint.fingerprint, _curve(checkpoint))


def _curve(checkpoint: Artifact) -> tuple[tuple[int, float], ...]:
    """(step, held-out loss) along a training."""
    return tuple((int(row["step"]), row[HELD_OUT_LOSS]) for row in history(checkpoint) if HELD_OUT_LOSS in row)

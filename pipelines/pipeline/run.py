"""A run of the workflow: labelled images to registered, evaluated models, one branch for each model."""

import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from edt_core.config import recorded_fields
from edt_core.data.left_out import left_out
from edt_core.environment import environment
from edt_core.errors import Stopped, UserError
from edt_core.store.artifact import Artifact, Source
from edt_core.store.layout import CLASSES_NAME
from edt_core.store.store import Store
from edt_core.training.speed.attention_table import attention_forms
from jobs.models.initial import Initial
from jobs.runtime.cluster_address import check_named
from jobs.stages import preprocess
from pipelines.cluster.ui import run_link
from pipelines.config.schema import PipelineConfig, as_yaml
from pipelines.config.size_check import check_pipeline_sizes
from pipelines.engine.step import StepFuture
from pipelines.engine.workflow import Workflow
from pipelines.outcome import Outcome
from pipelines.pipeline.branches import Branch, call_steps, initial_tags
from pipelines.pipeline.inputs import Published, prepare_source
from pipelines.pipeline.promotion import call_promotion
from pipelines.registry.aliases import GUIDE_CHECKPOINT_TAG, GUIDE_FROM_TAG
from pipelines.registry.kept import kept_tags
from pipelines.report.worth import remarks_on
from pipelines.terminal.run_log import FOLDER as LOGS
from pipelines.terminal.terminal import Terminal
from pipelines.tracking.catalog import Catalog, check_tracking, tracking_kept
from pipelines.tracking.runs import step_tag
from pipelines.tracking.wandb_mirror import WandbProject, check_wandb

Guard = Callable[[Workflow, Mapping[str, StepFuture]], None]


class HeldBackError(UserError):
    """The run ends before its trainings, because a person has to look at something first."""


@dataclass(frozen=True)
class Work:
    """What a run does: `call(workflow, config, source, published, outcome)` calls its steps and adds to the outcome.

    `workflow`: how the steps run. `record`: the name of the configuration in MLflow. `check(config, images,
    statistics)` raises UserError for numbers that would make a later step fail.
    """

    call: Callable[[Workflow, PipelineConfig, Source, Published, Outcome], None]
    workflow: type[Workflow] = Workflow
    record: str = "config.yaml"
    check: Callable[[PipelineConfig, int | None, Source | None], None] = check_pipeline_sizes


def run(
    config: PipelineConfig,
    terminal: Terminal,
    address: str | None = None,
    published: Published | None = None,
    tracking_uri: str | None = None,
    digest_again: bool = False,
    guard: Guard | None = None,
    on_start: Callable[[str], None] = lambda run_id: None,
    work: Work | None = None,
) -> Outcome:
    """Run the whole pipeline and reuse finished artifacts. Failures of steps are in the outcome, not raised.

    The first Ctrl-C requests a running training to stop, which is in the outcome as well. Without a running training,
    it is raised. `published`: the published inputs, if the caller has them already. `tracking_uri`: an MLflow to use
    instead of that of the environment or the store. `digest_again`: read every image, even if its digest is cached.
    `guard`: may hold the run back before its trainings, by HeldBackError, which is in the outcome as a failure.
    `on_start` is given the id of the run in MLflow. `work`: None for the whole pipeline.

    Raises UserError, before anything is computed, if the store or the source is unusable.
    """
    store = Store.open(config.store)
    work = work or Work(partial(_pipeline, guard))
    with store.in_use(), tracking_kept():
        return _run(config, store, terminal, address, published, tracking_uri, digest_again, work, on_start)


def _run(
    config: PipelineConfig,
    store: Store,
    terminal: Terminal,
    address: str | None,
    published: Published | None,
    tracking_uri: str | None,
    digest_again: bool,
    work: Work,
    on_start: Callable[[str], None],
) -> Outcome:
    check_named(address)
    check_tracking(tracking_uri)  # a Ray session takes longer to start
    check_wandb(config.wandb.project)
    for name in config.models:
        attention_forms(config.train_of(name))  # a training would refuse a bad file hours later
    from jobs.runtime.cluster import connect
    from jobs.runtime.reach import check_server

    started = time.monotonic()
    source = prepare_source(config.source, store.root, terminal, digest_again)
    work.check(config, source.images, None)

    def join() -> bool:
        shared = connect(address, min_cpus=config.workers, show_workers=terminal.log is not None)
        if shared and (uri := tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
            check_server(uri, "MLFLOW_TRACKING_URI")
        return shared

    # On a new store, MLflow creates its tables for about as long as Ray takes to start: do both in parallel.
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(Catalog.open, store.root, config.name, tracking_uri)
        if store.find(preprocess.STAGE.kind, images_fingerprint(config, source)) is None:
            join()
        catalog = opened.result()
    published = published or Published.of(config, catalog.tracking_uri, store, source.classes)
    work.check(config, source.images, published.statistics)
    run_id = catalog.start_run(config.name, {"edt.workflow": config.name, **_identities(source, published)})
    on_start(run_id)
    outcome = Outcome(run_id, catalog.tracking_uri, run_link(catalog.tracking_uri, catalog.experiment_id, run_id))
    terminal.say(f"MLflow    {outcome.link}", "dim")
    workflow = work.workflow(store, catalog, run_id, terminal, join, _wandb_project(config, store, run_id))
    status = "KILLED"
    try:
        with workflow.interrupts.handled():
            _record_start(catalog, run_id, config, work.record)
            work.call(workflow, config, source, published, outcome)
            workflow.wait_all()
        if not workflow.stopped:
            status = "FAILED" if workflow.culprits() or outcome.failures else "FINISHED"
    except Stopped as stopped:
        outcome.stopped = str(stopped)
    except HeldBackError as error:
        outcome.failures["guard"], status = error, "FAILED"
        workflow.wait_all()
    finally:
        outcome.failures |= workflow.culprits()
        reasons = "; ".join(f"{name}: {error}" for name, error in workflow.where_stopped().items())
        outcome.stopped = reasons or outcome.stopped
        _record(workflow, outcome, status)
        outcome.seconds = time.monotonic() - started
    return outcome


def _pipeline(
    guard: Guard | None,
    workflow: Workflow,
    config: PipelineConfig,
    source: Source,
    published: Published,
    outcome: Outcome,
) -> None:
    """Train, evaluate and register the model of each branch."""
    check = (lambda shared: None) if guard is None else partial(guard, workflow)
    branches = call_steps(workflow, config, source, published, check)
    record_steps(workflow)
    workflow.catalog.set_tags(workflow.run_id, initial_tags(branches))
    for branch in branches:
        _finish_branch(workflow, config, branch, outcome)


def _wandb_project(config: PipelineConfig, store: Store, run_id: str) -> WandbProject | None:
    """Where the run's numbers go beside MLflow. W&B keeps its own files beside the logs of a local store."""
    folder = None if store.root.local is None or "WANDB_DIR" in os.environ else str(store.root.local / LOGS)
    return WandbProject.of(config.wandb.project, config.wandb.entity, run_id, folder)


def _identities(source: Source, published: Published) -> dict[str, str]:
    """Tags with the fingerprints of a run's inputs: an alias can move, and the files at a path can change."""
    inputs = {**published.extractors, "autoencoder": published.autoencoder, "statistics": published.statistics}
    tags = {f"edt.{role}": item.fingerprint for role, item in inputs.items() if item is not None}
    return {"edt.source": source.fingerprint, **tags, **kept_tags(published.kept), **_guide_tags(published.guide)}


def _guide_tags(guide: Source | None) -> dict[str, str]:
    """What the field `sample.guide` meant: the place of the model, and the checkpoint artifact that it is of."""
    if not isinstance(guide, Initial):
        return {}
    checkpoint = {} if guide.checkpoint is None else {GUIDE_CHECKPOINT_TAG: guide.checkpoint}
    return {GUIDE_FROM_TAG: guide.location, **checkpoint}


def images_fingerprint(config: PipelineConfig, source: Source) -> str:
    """The fingerprint of the image shards, on which all other artifacts depend."""
    return preprocess.STAGE.fingerprint(config.preprocess, {"source": source.fingerprint})


def _record_start(catalog: Catalog, run_id: str, config: PipelineConfig, name: str) -> None:
    """Record in the parent run what is needed to find and reproduce it: configuration and versions."""
    catalog.log_text(run_id, as_yaml(config), name)
    catalog.log_text(run_id, json.dumps(environment(), indent=1, sort_keys=True), "environment.json")
    fields = recorded_fields(config)
    catalog.log_params(run_id, {name: value for name, value in fields.items() if name not in ("store", "name")})


def _finish_branch(workflow: Workflow, config: PipelineConfig, branch: Branch, outcome: Outcome) -> None:
    """Wait for the branch of one model, register it, write its report, and add the results to the outcome."""
    promotion = call_promotion(workflow, config, branch)
    if promotion is None:
        return
    promoted, report = promotion
    after = branch.steps["evaluation"].result().counts["metrics"]
    before = branch.steps.get("untrained_evaluation")
    outcome.decisions[branch.name] = promoted.decision
    outcome.metrics[branch.name] = (None if before is None else before.result().counts["metrics"], after)
    trainings = {seed: step.result().counts["metrics"] for seed, step in branch.evaluations().items()}
    outcome.trainings |= {branch.name: trainings} if trainings else {}
    artifacts = {role: step.result() for role, step in branch.steps.items()}
    outcome.remarks[branch.name] = remarks_on(artifacts, promoted.decision.metric, promoted.decision.lower_is_better)
    if workflow.wait(report):
        outcome.reports[branch.name] = report.result()


def record_steps(workflow: Workflow) -> None:
    """Record in the parent run the fingerprints of its steps. `edt gc` and `edt reproduce` read them.

    A run calls it when it has called its steps: the record must exist if the driver is killed.
    """
    tags = {step_tag(name): future.fingerprint for name, future in workflow.futures.items()}
    workflow.catalog.set_tags(workflow.run_id, tags)


def _left_out(images: Artifact | None) -> tuple[str, ...]:
    """What of the source was not used, a line each kind; nothing while that is not known."""
    if images is not None:
        with suppress(UserError, OSError):
            return tuple(left_out(images.counts, images.read_json(CLASSES_NAME)))
    return ()


def _record(workflow: Workflow, outcome: Outcome, status: str) -> None:
    """Record in the parent run which steps were reused, which ran, and which failed."""
    reused = sorted(n for n, future in workflow.futures.items() if future.reused or n in workflow.taken)
    ran = sorted(set(workflow.artifacts()) - set(reused))
    outcome.executed, outcome.reused = len(ran), len(reused)
    outcome.skipped = len(workflow.failures) - len(workflow.culprits())
    images = workflow.artifacts().get("preprocess")
    outcome.images = {} if images is None else images.counts
    outcome.left_out = _left_out(images)
    failed = "; ".join(f"{name}: {error}" for name, error in outcome.failures.items())[:4000]
    tags = {"edt.reused": ", ".join(reused), "edt.executed": ", ".join(ran), "edt.failed": failed}
    tags["edt.stopped"] = outcome.stopped[:4000]
    workflow.catalog.set_tags(workflow.run_id, {k: v for k, v in tags.items() if v})
    if workflow.terminal.log is not None:
        workflow.catalog.log_text(workflow.run_id, workflow.terminal.log.text(), "log.txt")
    record_steps(workflow)
    workflow.catalog.end_run(workflow.run_id, status)
    if status == "KILLED":
        workflow.catalog.end_children(workflow.run_id, status)

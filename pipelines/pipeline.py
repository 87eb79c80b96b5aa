"""The workflow: labelled images to registered, evaluated models, one branch a model."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from edt_core.config import SourceConfig, TrainConfig, recorded_fields, result_fields
from edt_core.environment import environment
from edt_core.errors import Stopped, UserError
from edt_core.evaluation.extractors import PUBLISHED_SPACES
from edt_core.store.artifact import Artifact, Source
from edt_core.store.folder import Folder
from edt_core.store.manifest import sha256_json
from edt_core.store.store import Store
from jobs.models.initial import INIT_CHECKPOINT_TAG, INIT_FROM_TAG, INIT_TAG, Initial, initial_source
from jobs.runtime.cluster_address import check_named
from jobs.stages import autoencoder, classifier, encode, evaluate, preprocess, reference, sample, train, validate
from jobs.stages.extractors import extractor_source
from jobs.stages.preprocess import image_source
from jobs.stages.train_start import check_start
from pipelines.champion import ChampionMeasurement
from pipelines.cluster.ui import run_link
from pipelines.config.schema import PipelineConfig, as_yaml, recorded_yaml
from pipelines.config.size_check import check_pipeline_sizes
from pipelines.engine.step import StepFuture
from pipelines.engine.steps import Promotion, Steps
from pipelines.engine.workflow import Workflow
from pipelines.outcome import Outcome
from pipelines.registry.gate import Decision
from pipelines.registry.kept import Kept, kept_networks, kept_tags
from pipelines.registry.registration import ENTRY_ROLES, entry_of, promote, registered
from pipelines.report import step as summary
from pipelines.report.history import VersionRecord, version_record
from pipelines.report.predecessor import predecessor_facts, predecessor_inputs
from pipelines.terminal.terminal import Terminal
from pipelines.tracking.catalog import Catalog, check_tracking, tracking_kept
from pipelines.tracking.runs import step_tag

_CACHE = "~/.cache/edt"
Guard = Callable[[Workflow, Mapping[str, StepFuture]], None]


class HeldBackError(UserError):
    """The run ends before its trainings, because a person has to look at something first."""


@dataclass(frozen=True)
class Branch:
    """The steps of one model, by role: those that all models share, and its own training and evaluation."""

    name: str
    train: TrainConfig
    steps: Mapping[str, StepFuture]
    start: Initial | None = None  # the model that its training starts from
    feature_networks: Mapping[str, StepFuture | Source] = field(default_factory=dict)


def prepare_source(config: SourceConfig, store: Folder, terminal: Terminal, digest_again: bool = False) -> Source:
    """The source images and their fingerprint. Raises UserError if there are no images to train on.

    With `digest_again` every image is read, even if its digest is cached.
    """
    from edt_core.data.digits import write_digits

    if config.kind == "digits":
        root = store.local or Path(_CACHE).expanduser()
        path = write_digits(root / "sources" / "digits")
        config = SourceConfig(kind="image_folder", path=str(path), classes=config.classes, limit=config.limit)
    return image_source(config, terminal.source_progress(), digest_again)


@dataclass(frozen=True)
class Published:
    """The published inputs of a pipeline besides the images, each identified by its present content."""

    autoencoder: Source | None = None
    extractors: Mapping[str, Source] = field(default_factory=dict)
    statistics: Source | None = None
    initial: Mapping[str, Initial] = field(default_factory=dict)  # by model
    kept: Mapping[str, Kept] = field(default_factory=dict)  # networks of registered versions, by role

    @classmethod
    def of(
        cls, config: PipelineConfig, tracking_uri: str | None, store: Store | None = None, classes: tuple[str, ...] = ()
    ) -> "Published":
        """The inputs that the configuration names. Raises UserError if one is missing, with where to get it.

        Networks of registered versions are kept if their artifacts are in `store`. `classes`: those of the images.
        """
        spaces = {space: config.network(space) for space in PUBLISHED_SPACES if space in config.extractors}
        statistics = config.reference_statistics
        return cls(
            autoencoder.published_source(config.autoencoder, tracking_uri),
            {space: extractor_source(space, s.weights, s.sha256, tracking_uri) for space, s in spaces.items()},
            None if statistics is None else reference.statistics_source(statistics),
            {name: start for name in config.models if (start := _initial(config, name, tracking_uri)) is not None},
            {} if store is None else kept_networks(config, tracking_uri, store, classes),
        )


def _initial(config: PipelineConfig, name: str, tracking_uri: str | None) -> Initial | None:
    """The model that the training of a registered model starts from. Raises UserError if there is none that fits."""
    start = initial_source(config.train_of(name), tracking_uri)
    check_start(config.train_of(name), start is not None)
    if start is not None:
        start.check(config.model_of(name, 2))
    return start


def images_fingerprint(config: PipelineConfig, source: Source) -> str:
    """The fingerprint of the image shards, on which all other artifacts depend."""
    return preprocess.STAGE.fingerprint(config.preprocess, {"source": source.fingerprint})


def call_steps(
    steps: Steps,
    config: PipelineConfig,
    source: Source,
    published: "Published | None" = None,
    check: Callable[[Mapping[str, StepFuture]], None] = lambda shared: None,
) -> list[Branch]:
    """Call every step up to the evaluations, without waiting. Branches run in parallel if resources allow.

    `check` is called with the steps that all models share, before those of the models. It may wait for them, and raise
    HeldBackError.
    """
    step, published = steps.step, published or Published()
    images = step("preprocess", preprocess.STAGE, config.preprocess, source=source)
    vae = _call_autoencoder(steps, config, images, published)
    latents = step("encode", encode.STAGE, config.encode, images=images, autoencoder=vae)
    feature_networks: dict[str, StepFuture | Source] = {**published.extractors}
    shared = {"images": images, "autoencoder": vae, "latents": latents}
    if "classifier" in config.extractors:
        feature_networks["classifier"] = shared["classifier"] = _call_classifier(steps, config, images, published)
    reference_inputs = {"images": published.statistics or images, **feature_networks}
    shared["reference"] = step("reference", reference.STAGE, config.reference, **reference_inputs)
    check(shared)
    branch = partial(_call_branch, steps, config, shared=shared, feature_networks=feature_networks)
    return [branch(name, start=published.initial.get(name)) for name in config.models]


def _call_autoencoder(steps: Steps, config: PipelineConfig, images: StepFuture, published: Published) -> StepFuture:
    """The autoencoder: of a registered version as it is, published, or fitted on the images."""
    if (kept := published.kept.get("autoencoder")) is not None:
        return steps.adopt("autoencoder", autoencoder.STAGE, kept.item, kept.version)
    if config.autoencoder.pretrained is None:
        return steps.step("autoencoder", autoencoder.STAGE, config.autoencoder, images=images)
    assert published.autoencoder is not None
    fields = config.autoencoder.published()
    return steps.step("autoencoder", autoencoder.STAGE, fields, published=published.autoencoder)


def _call_classifier(steps: Steps, config: PipelineConfig, images: StepFuture, published: Published) -> StepFuture:
    """The classifier: of a registered version as it is, or fitted on the images."""
    if (kept := published.kept.get("classifier")) is not None:
        return steps.adopt("classifier", classifier.STAGE, kept.item, kept.version)
    return steps.step("classifier", classifier.STAGE, config.classifier, images=images)


def _call_branch(
    steps: Steps,
    config: PipelineConfig,
    name: str,
    shared: Mapping[str, StepFuture],
    feature_networks: Mapping[str, StepFuture | Source],
    start: Initial | None,
) -> Branch:
    """Train, sample and evaluate one model, and the untrained model of the same seed if it starts from none."""
    trained = config.train_of(name)
    trainings = {"": trained}
    branch_steps = dict(shared)
    if start is None:
        trainings["untrained_"] = _untrained(trained)
    else:
        start = settled(start, trained, shared["latents"].fingerprint)
    for prefix, train_config in trainings.items():
        label = prefix.replace("_", " ")
        # The autoencoder decodes previews. It also shows whether latents of an older version have the right scale.
        inputs: dict[str, StepFuture | Source] = {role: shared[role] for role in ("latents", "autoencoder")}
        if start is not None:
            inputs |= {"init": start, "images": shared["images"]}
        checkpoint = steps.step(f"{label}train {name}", train.STAGE, train_config, **inputs)
        features = steps.step(
            f"{label}sample {name}",
            sample.STAGE,
            config.sample,
            checkpoint=checkpoint,
            autoencoder=shared["autoencoder"],
            **feature_networks,
        )
        evaluation = steps.step(
            f"{label}evaluate {name}",
            evaluate.STAGE,
            config.evaluate,
            features=features,
            reference=shared["reference"],
        )
        outputs = {"checkpoint": checkpoint, "features": features, "evaluation": evaluation}
        branch_steps |= {f"{prefix}{role}": future for role, future in outputs.items()}
    if config.validation.enabled:
        judged = {"features": branch_steps["features"], "classifier": shared["classifier"], "images": shared["images"]}
        branch_steps["validation"] = steps.step(f"validate {name}", validate.STAGE, config.validation, **judged)
    return Branch(name, trained, branch_steps, start, feature_networks)


def _untrained(trained: TrainConfig) -> TrainConfig:
    """The training of no steps that a training from random weights is compared with.

    It has only the fields that shape the initial weights and the chain: a learning rate does not change it.
    """
    fields = ("model", "seed", "num_timesteps", "objective")
    return TrainConfig(max_steps=0, **{field: getattr(trained, field) for field in fields})


def settled(start: Initial, config: TrainConfig, latents: str) -> Initial:
    """The model to start from, where an alias may name the model that this very training made before.

    That training is then found again, and not started once more from its own result.
    """
    before = start.before
    if before is None:
        return start
    again = train.STAGE.fingerprint(config, {"latents": latents, "init": before.fingerprint})
    return before if start.checkpoint == again else start


@dataclass(frozen=True)
class Promoted:
    """The decision about a model, and the registry's record of its version for the report."""

    decision: Decision
    record: VersionRecord
    champion: Mapping[str, StepFuture] = field(default_factory=dict)  # artifacts of the champion before, by role

    @property
    def version(self) -> str:
        return self.decision.version

    def __str__(self) -> str:
        return str(self.decision)


def call_promotion(steps: Steps, config: PipelineConfig, branch: Branch) -> tuple[Promoted, StepFuture] | None:
    """Call the promotion of one model, then its report. None if there is no decision yet, or the branch failed."""
    report = f"report {branch.name}"
    promoted = steps.promote(_promotion(config, branch, report))
    if promoted is None:
        return None
    inputs = {**branch.steps, **promoted.champion}
    return promoted, steps.step(report, summary.STAGE, _report_config(config, branch, promoted), **inputs)


def _promotion(config: PipelineConfig, branch: Branch, report: str) -> Promotion[Promoted]:
    """The promotion of one model, from the artifacts of its branch, by the gate in the configuration."""

    champion = ChampionMeasurement(config, branch.name, branch.steps, branch.feature_networks)

    def with_record(catalog: Catalog, decision: Decision) -> Promoted:
        before = predecessor_inputs(catalog, decision, Store(Folder.at(config.store)))
        return Promoted(decision, version_record(catalog, decision, config.store), before)

    def decide(catalog: Catalog, run_id: str, artifacts: Mapping[str, Artifact]) -> Promoted:
        entry = entry_of(artifacts)
        return with_record(catalog, promote(catalog, run_id, branch.name, config.promote, entry, champion.result()))

    def find(catalog: Catalog, artifacts: Mapping[str, Artifact]) -> tuple[Promoted, str] | None:
        previous = registered(catalog, branch.name, config.promote, entry_of(artifacts))
        return None if previous is None else (with_record(catalog, previous[0]), previous[1])

    roles = ("checkpoint", "evaluation", "untrained_evaluation")
    artifacts = {role: branch.steps[role].fingerprint for role in roles if role in branch.steps}
    gate = {"model": branch.name, **result_fields(config.promote)}
    identity = sha256_json({**artifacts, "gate": gate})
    after = branch.steps["evaluation"].name
    return Promotion(branch.name, identity, branch.steps, ENTRY_ROLES, after, report, decide, find, champion.call)


def _report_config(config: PipelineConfig, branch: Branch, promoted: Promoted) -> summary.SummaryConfig:
    """The configuration of a model's report: the facts that are in no artifact."""
    decision = promoted.decision
    aliases = ["candidate", *(["champion"] if decision.became_champion else [])]

    def short(step: str) -> str:
        return step.removesuffix(f" {branch.name}")

    return summary.SummaryConfig(
        champion=predecessor_facts(decision),
        title=f"{branch.name} version {decision.version}",
        pipeline=config.name,
        model={"name": branch.name, "version": decision.version, "aliases": aliases},
        decision=str(decision),
        registry=promoted.record,
        lineage={role: (short(f.name), tuple(map(short, f.needs))) for role, f in branch.steps.items()},
        config_yaml=recorded_yaml(config.model_copy(update={"store": "."})),
    )


def run(
    config: PipelineConfig,
    terminal: Terminal,
    address: str | None = None,
    published: Published | None = None,
    tracking_uri: str | None = None,
    digest_again: bool = False,
    guard: Guard | None = None,
) -> Outcome:
    """Run the whole pipeline and reuse finished artifacts. Failures of steps are in the outcome, not raised.

    The first Ctrl-C requests a running training to stop, which is in the outcome as well. Without a running training,
    it is raised. `published`: the published inputs, if the caller has them already. `tracking_uri`: an MLflow to use
    instead of that of the environment or the store. `digest_again`: read every image, even if its digest is cached.
    `guard`: may hold the run back before its trainings, by HeldBackError, which is in the outcome as a failure.

    Raises UserError, before anything is computed, if the store or the source is unusable.
    """
    store = Store.open(config.store)
    with store.in_use(), tracking_kept():
        return _run(config, store, terminal, address, published, tracking_uri, digest_again, guard)


def _run(
    config: PipelineConfig,
    store: Store,
    terminal: Terminal,
    address: str | None,
    published: Published | None,
    tracking_uri: str | None,
    digest_again: bool,
    guard: Guard | None,
) -> Outcome:
    check_named(address)
    check_tracking(tracking_uri)  # a Ray session takes longer to start
    from jobs.runtime.cluster import connect

    started = time.monotonic()
    source = prepare_source(config.source, store.root, terminal, digest_again)
    check_pipeline_sizes(config, source.images)

    def join() -> bool:
        return connect(address, min_cpus=config.workers, show_workers=terminal.log is not None)

    # On a new store, MLflow creates its tables for about as long as Ray takes to start: do both in parallel.
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(Catalog.open, store.root, config.name, tracking_uri)
        if store.find(preprocess.STAGE.kind, images_fingerprint(config, source)) is None:
            join()
        catalog = opened.result()
    published = published or Published.of(config, catalog.tracking_uri, store, source.classes)
    check_pipeline_sizes(config, source.images, published.statistics)
    run_id = catalog.start_run(config.name, {"edt.workflow": config.name, **_identities(source, published)})
    outcome = Outcome(run_id, catalog.tracking_uri, run_link(catalog.tracking_uri, catalog.experiment_id, run_id))
    terminal.say(f"MLflow    {outcome.link}", "dim")
    workflow = Workflow(store, catalog, run_id, terminal, connect=join)
    status = "KILLED"
    try:
        with workflow.interrupts.handled():
            _record_start(catalog, run_id, config)
            check = (lambda shared: None) if guard is None else partial(guard, workflow)
            branches = call_steps(workflow, config, source, published, check)
            _record_steps(workflow)  # already now: the record must exist if the driver is killed
            catalog.set_tags(run_id, initial_tags(branches))
            for branch in branches:
                _finish_branch(workflow, config, branch, outcome)
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


def _identities(source: Source, published: Published) -> dict[str, str]:
    """Tags with the fingerprints of a run's inputs: an alias can move, and the files at a path can change."""
    inputs = {**published.extractors, "autoencoder": published.autoencoder, "statistics": published.statistics}
    tags = {f"edt.{role}": item.fingerprint for role, item in inputs.items() if item is not None}
    return {"edt.source": source.fingerprint, **tags, **kept_tags(published.kept)}


def initial_tags(branches: Sequence[Branch]) -> dict[str, str]:
    """Tags of a run: the model that each training starts from, by content, place and checkpoint artifact."""
    tags: dict[str, str] = {}
    for name, start in ((branch.name, branch.start) for branch in branches):
        if start is not None:
            tags |= {f"{INIT_TAG}.{name}": start.fingerprint, f"{INIT_FROM_TAG}.{name}": start.location}
            tags |= {f"{INIT_CHECKPOINT_TAG}.{name}": start.checkpoint} if start.checkpoint else {}
    return tags


def _record_start(catalog: Catalog, run_id: str, config: PipelineConfig) -> None:
    """Record in the parent run what is needed to find and reproduce it: configuration and versions."""
    catalog.log_text(run_id, as_yaml(config), "config.yaml")
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
    if workflow.wait(report):
        outcome.reports[branch.name] = report.result()


def _record_steps(workflow: Workflow) -> None:
    """Record in the parent run the fingerprints of its steps. `edt gc` and `edt reproduce` read them."""
    tags = {step_tag(name): future.fingerprint for name, future in workflow.futures.items()}
    workflow.catalog.set_tags(workflow.run_id, tags)


def _record(workflow: Workflow, outcome: Outcome, status: str) -> None:
    """Record in the parent run which steps were reused, which ran, and which failed."""
    reused = sorted(n for n, future in workflow.futures.items() if future.reused or n in workflow.taken)
    ran = sorted(set(workflow.artifacts()) - set(reused))
    outcome.executed, outcome.reused = len(ran), len(reused)
    outcome.skipped = len(workflow.failures) - len(workflow.culprits())
    outcome.images = next((a.counts for a in workflow.artifacts().values() if a.manifest.kind == "images"), {})
    failed = "; ".join(f"{name}: {error}" for name, error in outcome.failures.items())[:4000]
    tags = {"edt.reused": ", ".join(reused), "edt.executed": ", ".join(ran), "edt.failed": failed}
    tags["edt.stopped"] = outcome.stopped[:4000]
    workflow.catalog.set_tags(workflow.run_id, {k: v for k, v in tags.items() if v})
    if workflow.terminal.log is not None:
        workflow.catalog.log_text(workflow.run_id, workflow.terminal.log.text(), "log.txt")
    _record_steps(workflow)
    workflow.catalog.end_run(workflow.run_id, status)
    if status == "KILLED":
        workflow.catalog.end_children(workflow.run_id, status)

"""The steps of a pipeline: those that all models share, then a branch for each model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from edt_core.config import GuideConfig, TrainConfig
from edt_core.diffusion import objective_of
from edt_core.evaluation.config import ScalingConfig
from edt_core.evaluation.trainings import seed_role
from edt_core.store.artifact import Source
from jobs.models.initial import INIT_CHECKPOINT_TAG, INIT_FROM_TAG, INIT_TAG, Initial
from jobs.stages import along, autoencoder, classifier, encode, evaluate, preprocess, reference, sample, train, validate
from jobs.stages.guide import step as guide
from jobs.stages.scaling import step as scaling
from jobs.stages.scaling.step import roles_of
from jobs.stages.training.follow import ALONG, UNTIL, Beside, Made
from pipelines.config.schema import PipelineConfig
from pipelines.engine.step import StepFuture
from pipelines.engine.steps import Steps
from pipelines.pipeline.guides import call_guide
from pipelines.pipeline.inputs import Published
from pipelines.pipeline.pruning import call_pruning
from pipelines.setup.measured_time import chain_passes


@dataclass(frozen=True)
class Branch:
    """The steps of one model, by role: those that all models share, and its own training and evaluation.

    `beside`: steps that only the report waits for; the model is registered without them. `seeds`: of its further
    trainings, whose evaluations count for the spread alone; their steps have the roles of `seed_role`.
    """

    name: str
    train: TrainConfig
    steps: Mapping[str, StepFuture]
    start: Initial | None = None  # the model that its training starts from
    feature_networks: Mapping[str, StepFuture | Source] = field(default_factory=dict)
    beside: Mapping[str, StepFuture] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()

    def evaluations(self) -> dict[int, StepFuture]:
        """The evaluation of each training by its seed, that of the registered model first; empty for one training."""
        further = {seed: self.steps[seed_role(seed, "evaluation")] for seed in self.seeds}
        return {self.train.seed: self.steps["evaluation"], **further} if further else {}


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
    published = published or Published()
    shared = call_data(steps, config, source, published)
    images = shared["images"]
    feature_networks: dict[str, StepFuture | Source] = {**published.extractors}
    if "classifier" in config.extractors:
        feature_networks["classifier"] = shared["classifier"] = _call_classifier(steps, config, images, published)
    reference_inputs = {"images": published.statistics or images, **feature_networks}
    shared["reference"] = steps.step("reference", reference.STAGE, config.reference, **reference_inputs)
    if published.guide is not None:
        shared["guide"] = steps.step("guide", guide.STAGE, GuideConfig(), model=published.guide)
    check(shared)
    branch = partial(_call_branch, steps, config, shared, feature_networks)
    branches = [
        branch(name, [train.settled(source.images) for train in config.trainings_of(name)], published.initial.get(name))
        for name in config.models
    ]
    if config.ladder.budgets:
        _call_scaling(steps, config, branches)
    return branches


def call_data(steps: Steps, config: PipelineConfig, source: Source, published: Published) -> dict[str, StepFuture]:
    """Call the steps that trainings read from: images, autoencoder and latents, by role."""
    images = steps.step("preprocess", preprocess.STAGE, config.preprocess, source=source)
    vae = _call_autoencoder(steps, config, images, published)
    latents = steps.step("encode", encode.STAGE, config.encode, images=images, autoencoder=vae, **published.tokens)
    return {"images": images, "autoencoder": vae, "latents": latents}


def _call_scaling(steps: Steps, config: PipelineConfig, branches: Sequence[Branch]) -> None:
    """Compare the trainings of a ladder, whose rungs are the branches."""
    inputs: dict[str, StepFuture] = {}
    for number, branch in enumerate(branches):
        inputs |= zip(roles_of(number), (branch.steps["checkpoint"], branch.steps["evaluation"]), strict=True)
    compared = ScalingConfig(
        rungs=config.ladder.rungs,
        passes=chain_passes(config.sample, config.train),
        metric=config.promote.metric,
        lower_is_better=config.promote.lower_is_better,
        resamples=config.ladder.resamples,
        confidence=config.ladder.confidence,
    )
    steps.step("scaling", scaling.STAGE, compared, **inputs)


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
    shared: Mapping[str, StepFuture],
    feature_networks: Mapping[str, StepFuture | Source],
    name: str,
    settled_trainings: Sequence[TrainConfig],
    start: Initial | None,
) -> Branch:
    """Train, sample and evaluate one model with each seed, and the untrained model of the first if it starts from none.

    `settled_trainings`: the configurations of its trainings; the first is registered.
    """
    trained, *further = settled_trainings
    trainings = {"": trained}
    branch_steps = dict(shared)
    beside = _evaluations(config, shared, feature_networks)
    if start is None:
        trainings |= {} if config.ladder.budgets else {"untrained_": untrained_of(trained)}
    else:
        until = {} if beside is None or trained.patience is None else {UNTIL: beside.fingerprint}
        start = settled(start, trained, {"latents": shared["latents"].fingerprint, **until})
    trainings |= {seed_role(train.seed, ""): train for train in further}
    branch_steps |= call_pruning(steps, config, shared, name, trained, start)
    for prefix, train_config in trainings.items():
        label = prefix.replace("_", " ")
        # The autoencoder decodes previews. It also shows whether latents of an older version have the right scale.
        inputs: dict[str, StepFuture | Source] = {role: shared[role] for role in ("latents", "autoencoder")}
        if start is not None:
            inputs["init"] = branch_steps.get("pruning", start)
        if start is not None or train_config.holdout_share:
            inputs["images"] = shared["images"]  # for class names and digests
        if beside is not None and train_config.max_steps and (train_config is trained or trained.patience is not None):
            inputs |= _followed(train_config, beside, shared, feature_networks)
        checkpoint = steps.step(f"{label}train {name}", train.STAGE, train_config, **inputs)
        of_guide = call_guide(steps, config, shared, label, name, train_config, checkpoint)
        branch_steps |= {f"{prefix}{role}": future for role, future in of_guide.items()}
        features = steps.step(
            f"{label}sample {name}",
            sample.STAGE,
            config.sample,
            checkpoint=checkpoint,
            autoencoder=shared["autoencoder"],
            **feature_networks,
            **_guide_of(branch_steps, prefix),
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
    curves: dict[str, StepFuture] = {}
    if beside is not None and trained.max_steps:
        measured = {role: branch_steps[role] for role in ("checkpoint", "autoencoder", "reference")}
        curves["along"] = steps.step(f"along {name}", along.STAGE, config.along, **measured, **feature_networks)
    seeds = tuple(train.seed for train in further)
    return Branch(name, trained, branch_steps, start, feature_networks, curves, seeds)


def _guide_of(branch_steps: Mapping[str, StepFuture], prefix: str) -> dict[str, StepFuture]:
    """The guide of a training's samples: its own, or that of the registered model, which the untrained one has too."""
    own = branch_steps.get(f"{prefix}guide", branch_steps.get("guide"))
    return {} if own is None else {"guide": own}


def _evaluations(
    config: PipelineConfig, shared: Mapping[str, StepFuture], networks: Mapping[str, StepFuture | Source]
) -> Beside | None:
    """The evaluations along the trainings; None if there are none."""
    if config.along.every is None:
        return None
    inputs = {"autoencoder": shared["autoencoder"], "reference": shared["reference"], **networks}
    made = {
        role: Made(item.kind, item.fingerprint) if isinstance(item, StepFuture) else item
        for role, item in inputs.items()
    }
    return Beside(config.along, made, config.promote.metric, config.promote.lower_is_better)


def _followed(
    trained: TrainConfig,
    beside: Beside,
    shared: Mapping[str, StepFuture],
    networks: Mapping[str, StepFuture | Source],
) -> dict[str, Any]:
    """The inputs of a training that evaluations begin beside; with patience it needs what they are made with."""
    if trained.patience is None:
        return {ALONG: beside}
    return {UNTIL: beside, "reference": shared["reference"], **networks}


def untrained_of(trained: TrainConfig) -> TrainConfig:
    """The training of no steps that a training from random weights is compared with.

    It has only the fields that shape the initial weights, the chain and the scale of the latents: a learning rate does
    not change it.
    """
    shape = ("model", "model_overrides", "width", "mup_base_width", "seed")
    fields = (*shape, "num_timesteps", "objective", "latent_norm")
    shaping = {field: getattr(trained, field) for field in fields}
    return TrainConfig(max_steps=0, **objective_of(trained.objective).train_defaults, **shaping)


def settled(start: Initial, config: TrainConfig, inputs: Mapping[str, str]) -> Initial:
    """The model to start from, where an alias may name the model that this very training made before.

    That training is then found again, and not started once more from its own result. `inputs`: the fingerprints of its
    other inputs.
    """
    before = start.before
    if before is None:
        return start
    again = train.STAGE.fingerprint(config, {**inputs, "init": before.fingerprint})
    return before if start.checkpoint == again else start


def initial_tags(branches: Sequence[Branch]) -> dict[str, str]:
    """Tags of a run: the model that each training starts from, by content, place and checkpoint artifact."""
    tags: dict[str, str] = {}
    for name, start in ((branch.name, branch.start) for branch in branches):
        if start is not None:
            tags |= {f"{INIT_TAG}.{name}": start.fingerprint, f"{INIT_FROM_TAG}.{name}": start.location}
            tags |= {f"{INIT_CHECKPOINT_TAG}.{name}": start.checkpoint} if start.checkpoint else {}
    return tags

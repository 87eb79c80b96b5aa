"""PipelineConfig: one frozen schema with the sections of all stages, read from YAML files and `--set`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml
from pydantic import Field, field_validator, model_validator

from edt_core.config import (
    AutoencoderConfig,
    ChainConfig,
    ClassifierConfig,
    EncodeConfig,
    PreprocessConfig,
    ReferenceConfig,
    Section,
    SourceConfig,
    TrainConfig,
    ValidateConfig,
    added,
    recorded_fields,
    runtime,
)
from edt_core.diffusion import SamplerChoice, check_training, objective_of, with_objective
from edt_core.errors import UserError
from edt_core.evaluation.config import AlongConfig, EvaluateConfig
from edt_core.evaluation.extractors import INCEPTION, TOKEN_SPACES
from edt_core.evaluation.metrics import metric_name, space_metrics
from edt_core.files.place_names import check_store_name
from edt_core.models import ModelConfig, check_masked_loss, chosen_amm_blocks, model_config, with_trained_amm
from edt_core.models.families.codes import LEVELS
from edt_core.printing.redaction import redacted_values
from edt_core.sampling.sampler import check_guidance
from edt_core.store.folder import Folder
from edt_core.training.align.settings import align_settings
from edt_core.training.optimizers.mup import check_mup
from jobs.commands.options import parse_assignment, read_yaml, validated
from jobs.runtime.tracking import own_uri
from pipelines.config.defaults import with_defaults
from pipelines.config.guide import PipelineSampleConfig, SimsConfig, check_guide_of, check_reference_of
from pipelines.config.ladder import LadderConfig, check_ladder, steps_of_rungs, with_rungs
from pipelines.config.networks import ExtractorConfig, ExtractorName, with_networks
from pipelines.config.prune import PruneConfig, check_prune

DEFAULT_CONFIG = "quickstart"
_SHIPPED = Path(__file__).parents[1] / "configs"


class PromoteConfig(Section):
    """When a new version becomes champion, and what is published with it."""

    metric: str = Field("fd_classifier", description="the metric that decides")
    lower_is_better: bool = Field(True, description="true for a distance; false for precision, recall and scores")
    margin: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="required improvement over the champion, or over the untrained model while there is no champion, "
        "as a fraction of its value; null for more than two standard deviations of the repeats, or 0.01 if there is "
        "only one repeat",
    )
    teacher_margin: float | None = added(
        None,
        ge=0,
        description="of a distilled model: by how much it may be worse than its teacher by the teacher's own protocol, "
        "as a fraction of that value; null for no limit",
    )
    require: dict[str, tuple[float | None, float | None]] = Field(
        {}, description="metric -> [least, most] allowed for every new champion; null for no limit"
    )
    license: str | None = Field(None, description="license of the model for its card: an identifier such as apache-2.0")
    torch_export: bool = Field(
        False, description="also store the denoiser as a torch.export program, which stores its weights a second time"
    )

    @model_validator(mode="after")
    def _limits_can_be_kept(self) -> "PromoteConfig":
        for metric, (least, most) in self.require.items():
            if least is not None and most is not None and least > most:
                raise ValueError(
                    f"promote.require of {metric} is [{least:g}, {most:g}]: the least is above the most; swap them"
                )
        return self


class RetrainConfig(Section):
    """Limits of `edt retrain`. `edt run` does not read them."""

    max_device_hours: float | None = runtime(
        None,
        gt=0,
        description="refuse a training that would take more; end one with a checkpoint when they are used up",
    )
    max_drift: float | None = runtime(
        None,
        ge=0,
        description="greatest Fréchet distance of the images to the champion's; above it, or with other classes, no "
        "training starts",
    )


class ValidationConfig(ValidateConfig):
    """How often the classifier predicts the right class of samples and of real images: a step beside `evaluate`."""

    enabled: bool = runtime(False, description="run this step; it requires `classifier` in extractors")


Event = Literal["failed", "promoted", "refused", "data_changed", "nothing_to_do"]


class NotifyConfig(Section):
    """Which events of a run are sent, and which environment variable has the addresses. No record holds an address."""

    variable: str = runtime(
        "EDT_NOTIFY_URLS",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable with addresses, separated by spaces: https://... receives the notification "
        "as JSON; any other URL is a service of Apprise, as slack://...",
    )
    events: tuple[Event, ...] = runtime(get_args(Event), description="events that are sent")
    timeout_s: float = runtime(10.0, gt=0, le=120, description="seconds to wait for an address")


class WandbConfig(Section):
    """Weights & Biases beside MLflow: training curves and final metrics. It needs the package wandb."""

    project: str | None = runtime(None, min_length=1, description="project of W&B; null writes nothing there")
    entity: str | None = runtime(None, min_length=1, description="user or team of W&B; null for the default of its key")


class _FieldsBeforeNetworks(Section):
    """The fields of a pipeline before the sections of published feature networks."""

    name: str = runtime(..., description="name of the pipeline in lists of runs, in schedules and for --no-overlap")
    store: str = runtime("./edt-store", description="folder or URI of all artifacts")
    source: SourceConfig
    preprocess: PreprocessConfig = PreprocessConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    encode: EncodeConfig = EncodeConfig()
    extractors: tuple[ExtractorName, ...] = Field(
        ("classifier",), min_length=1, description="feature spaces in which samples are compared with real images"
    )
    classifier: ClassifierConfig = ClassifierConfig()


if TYPE_CHECKING:
    _WithNetworks = _FieldsBeforeNetworks
else:
    _WithNetworks = with_networks(_FieldsBeforeNetworks)


class PipelineConfig(_WithNetworks):
    """One pipeline, from images to registered models."""

    reference: ReferenceConfig = ReferenceConfig()
    reference_statistics: str | None = runtime(
        None,
        description="ADM's .npz of Inception statistics (VIRTUAL_imagenet256_labeled.npz), used instead of the images",
    )
    train: TrainConfig = TrainConfig()
    sample: PipelineSampleConfig = PipelineSampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sims: SimsConfig = added(SimsConfig())
    prune: PruneConfig = added(PruneConfig())
    along: AlongConfig = added(AlongConfig())
    validation: ValidationConfig = added(ValidationConfig())  # `validate` is a method of pydantic's models
    promote: PromoteConfig = PromoteConfig()
    notify: NotifyConfig = added(NotifyConfig())
    retrain: RetrainConfig = added(RetrainConfig())
    wandb: WandbConfig = added(WandbConfig())
    ladder: LadderConfig = added(LadderConfig())
    models: dict[str, dict[str, Any]] = Field(
        min_length=1, description="registry name -> the fields of `train` that differ for this model"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_objectives(cls, values: Any) -> Any:
        """Fields of the recipe and the sampler that are not given are those of the objective, and are then recorded."""
        return with_defaults(values) if isinstance(values, dict) else values

    @field_validator("store")
    @classmethod
    def _can_be_recorded(cls, store: str) -> str:
        folder = Folder.at(store)
        if folder.local is not None:
            check_store_name(folder.local)
        own_uri(folder)
        return store

    @model_validator(mode="after")
    def _ladder_can_be_climbed(self) -> "PipelineConfig":
        if self.ladder.budgets:
            check_ladder(self)
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> "PipelineConfig":
        for name in self.models:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"the model name {name!r} is no valid registry name; use letters, digits, '.', '_' and '-'"
                )
            train = self.train_of(name)
            model = self.model_of(name, 2)
            check_masked_loss(model, train.masked_loss)
            if self.autoencoder.pretrained is None:  # the latents of a published one are checked before training
                model.check_latents({"levels": list(LEVELS)} if self.autoencoder.kind == "fsq" else {})
            align_settings(train, model)
            check_mup(train, model)
            if train.max_steps > 0:  # an untrained model has no loss
                check_training(train)
            teacher = [] if train.distill is None else [("train.distill.teacher", train.distill.teacher)]
            for section, chain in (*self._chains(), *teacher):
                self.model_of(name, 2, chosen_amm_blocks(model, chain.amm_blocks, chain.cfg_scale))
                _check_chain(section, chain, model, name, train)
        if self.reference_statistics is not None and self.extractors != (INCEPTION,):
            raise ValueError(
                f"reference_statistics are of Inception features, but extractors is {list(self.extractors)}; set "
                "extractors to [inception], or compare with the images (reference_statistics: null)"
            )
        return self

    @model_validator(mode="after")
    def _what_is_pruned_is_trained(self) -> "PipelineConfig":
        check_prune(self)
        return self

    @model_validator(mode="after")
    def _guide_is_kept(self) -> "PipelineConfig":
        check_guide_of(self)
        check_reference_of(self)
        return self

    @model_validator(mode="after")
    def _kept_checkpoints_can_be_measured(self) -> "PipelineConfig":
        along = self.along
        for name in self.models:
            train = self.train_of(name)
            if along.every is None and train.patience is not None:
                raise ValueError(
                    f"train.patience is {train.patience} for {name}, but nothing is evaluated along its training; set "
                    "along.every to the number of steps between two evaluations, or leave train.patience out"
                )
            if along.every is None:
                continue
            if train.keep_every is not None and along.every % train.keep_every:
                raise ValueError(
                    f"along.every {along.every} is no multiple of train.keep_every {train.keep_every} of {name}, so "
                    "some checkpoints would be missing; make it one, or leave train.keep_every out"
                )
            if train.trainable != "all":
                raise ValueError(
                    f"along.every is set, but {name} trains only some parameters (train.trainable {train.trainable}), "
                    "and only its last model has all: set along.every=null or train.trainable=all"
                )
        return self

    @model_validator(mode="after")
    def _latents_have_the_tokens(self) -> "PipelineConfig":
        trainings = {name: self.train_of(name) for name in self.models}
        shapes = {name: train.align_features for name, train in trainings.items() if train.align == "features"}
        first = next(iter(shapes), "")
        for name, shape in shapes.items():
            if shape != shapes[first]:
                raise ValueError(
                    f"train.align_features is {list(shapes[first])} for {first} and {list(shape)} for {name}, but all "
                    "models train on the same latents, which have the tokens of one network; give both the same, or "
                    "train them in two configurations"
                )
        return self

    @model_validator(mode="after")
    def _reader_has_shards(self) -> "PipelineConfig":
        streamed = [name for name in self.models if self.train_of(name).reader == "webdataset"]
        if streamed and not self.encode.write_webdataset:
            raise ValueError(
                f"train.reader of {streamed[0]} is webdataset, but encode.write_webdataset is false, so there are no "
                "tar shards to read; set encode.write_webdataset=true or train.reader=arrow"
            )
        return self

    @model_validator(mode="after")
    def _required_metrics_are_measured(self) -> "PipelineConfig":
        measured = [
            metric_name(metric, space)
            for space in self.extractors
            for metric in space_metrics(space)
            if self.evaluate.metrics is None or metric in self.evaluate.metrics
        ]
        measured += ["accuracy_classifier"] if "classifier" in self.extractors else []
        for field, metric in (("metric", self.promote.metric), *(("require", m) for m in self.promote.require)):
            if metric not in measured:
                raise ValueError(
                    f"promote.{field} {metric!r} is not measured; measured are: {', '.join(measured)}. "
                    "Choose one of these, or add the metric to evaluate.metrics and its space to extractors"
                )
        along = self.along
        if along.every is not None and along.metrics is not None:
            names = [metric_name(metric, space) for space in self.extractors for metric in along.metrics]
            if self.promote.metric not in [*names, "accuracy_classifier"]:
                raise ValueError(
                    f"along.metrics measures {', '.join(names)}, but the report shows promote.metric, which is "
                    f"{self.promote.metric}: add it to along.metrics, or set along.metrics to null for all"
                )
        return self

    @model_validator(mode="after")
    def _validation_has_classifier(self) -> "PipelineConfig":
        if self.validation.enabled and "classifier" not in self.extractors:
            raise ValueError(
                f"validation.enabled is true, but extractors is {list(self.extractors)}: validation uses the "
                "classifier of the run; add classifier to extractors, or set validation.enabled=false"
            )
        return self

    def _chains(self) -> list[tuple[str, ChainConfig]]:
        """The sections that sample from each model, by name."""
        along = [] if self.along.every is None else [("along", self.along)]
        return [("sample", self.sample), *along]

    def train_of(self, model: str) -> TrainConfig:
        """The training of one registered model: the shared section with the model's own fields on top.

        With evaluations along the training it keeps the checkpoints that they need. Of several seeds it has the first.
        """
        return self.trainings_of(model)[0]

    def trainings_of(self, model: str) -> tuple[TrainConfig, ...]:
        """The trainings of one registered model, one for each of its seeds; the first is registered."""
        fields = {**self.train.model_dump(), **self.models[model]}
        if fields.get("keep_every") is None and fields["max_steps"]:
            fields["keep_every"] = self.along.every
        train: TrainConfig = validated(TrainConfig, fields)
        if train.seeds and "seed" in self.models[model] and "seeds" not in self.models[model]:
            raise UserError(
                f"models.{model}.seed is {train.seed}, but train.seeds is {list(train.seeds)} for all models; set "
                f"models.{model}.seeds=[{train.seed}]"
            )
        return tuple(train.model_copy(update={"seed": seed, "seeds": ()}) for seed in train.seeds or (train.seed,))

    def model_of(self, model: str, num_classes: int, amm_blocks: Sequence[int] = ()) -> ModelConfig:
        """The configuration of one registered model. Raises ValueError if the sizes do not fit together."""
        train = self.train_of(model)
        config = model_config(
            train.model,
            self.preprocess.image_size,
            num_classes,
            amm_blocks,
            autoencoder_factor=self.autoencoder.downsample_factor,
            latent_channels=self.autoencoder.latent_channels,
            overrides=train.model_overrides,
            width=train.width,
        )
        return with_trained_amm(with_objective(config, train.objective), train.amm_blocks)

    def token_spaces(self) -> tuple[str, ...]:
        """The feature networks whose tokens some training aligns with; the encoding stores them."""
        aligned = any(self.train_of(name).align == "features" for name in self.models)
        return TOKEN_SPACES if aligned else ()

    def network(self, space: str) -> ExtractorConfig:
        """The section of a published feature network."""
        section: ExtractorConfig = getattr(self, space)
        return section

    @property
    def workers(self) -> int:
        """The number of CPU workers of the largest stage."""
        train_workers = [self.train_of(name).worker_range[1] for name in self.models]
        samplers = [self.sample.num_workers] + ([] if self.along.every is None else [self.along.num_workers])
        return max(*train_workers, *samplers, self.encode.num_workers, self.reference.num_workers)


def _check_chain(section: str, chain: ChainConfig, model: ModelConfig, name: str, train: TrainConfig) -> None:
    """Raise ValueError or UserError if the model `name` of this training cannot be sampled by a chain."""
    objective, steps, channels = objective_of(train.objective), chain.num_sampling_steps, model.in_channels
    objective.check_sampler(SamplerChoice.of(chain))
    if steps > (objective.max_steps(train.num_timesteps) or steps):
        raise ValueError(
            f"{section}.num_sampling_steps {steps} is more than the {train.num_timesteps} timesteps of {name} "
            "(train.num_timesteps); use at most that many"
        )
    if (chain.guidance_channels or 1) > channels:
        raise ValueError(
            f"{section}.guidance_channels {chain.guidance_channels} is more than the {channels} latent channels; use "
            f"at most {channels}, or null for all"
        )
    check_guidance(chain, model, train.num_timesteps)


def config_names() -> list[str]:
    """Names of the configurations that ship with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load_config(
    name_or_path: str = DEFAULT_CONFIG, assignments: Sequence[str] = (), store: str | None = None
) -> PipelineConfig:
    """A shipped configuration by name, or a YAML file, with `a.b=value` assignments on top.

    Raises UserError if there is no such configuration, it is not YAML, a key is unknown, or a value is invalid.
    """
    values = given_values(name_or_path, assignments, store)
    if values.get("ladder"):
        values = _expanded(values)
    config: PipelineConfig = validated(PipelineConfig, values)
    return config


def given_values(name_or_path: str, assignments: Sequence[str] = (), store: str | None = None) -> dict[str, Any]:
    """The values that a configuration gives, with those of its bases and the assignments on top, not yet validated."""
    values = _read_yaml(name_or_path)
    for text in assignments:
        key, value = parse_assignment(text)
        assign(values, key, value)
    if store is not None:
        values["store"] = store
    return values


def _expanded(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration whose models are the rungs of its ladder, each with the steps of its budget."""
    ladder = validated(LadderConfig, values["ladder"])
    if not ladder.budgets:
        return values
    draft: PipelineConfig = validated(PipelineConfig, with_rungs(values, ladder))
    return with_rungs(values, ladder, steps_of_rungs(draft))


def _read_yaml(name_or_path: str, chain: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a configuration, on top of those of its `base: NAME_OR_PATH`."""
    if name_or_path in chain:
        raise UserError(
            f"configurations are based on each other: {' -> '.join([*chain, name_or_path])}; remove one `base`"
        )
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.exists():
        values = read_yaml(path)
    elif name_or_path in config_names():
        values = read_yaml(_SHIPPED / f"{name_or_path}.yaml")
    else:
        names = ", ".join(config_names())
        raise UserError(f"no configuration {name_or_path!r}: it is neither a file nor one of {names}")
    if (base := values.pop("base", None)) is None:
        return values
    return _on_top(_read_yaml(str(base), (*chain, name_or_path)), values)


def _on_top(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A base with other values on top: field by field in sections, but `models` as a whole."""
    merged = base | values
    for name, section in values.items():
        if isinstance(section, dict) and isinstance(base.get(name), dict) and name != "models":
            merged[name] = base[name] | section
    return merged


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the field at a dotted key, in place. Raises UserError if the key leads through a value."""
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values.setdefault(parent, {}), dict):
            raise UserError(f"--set {key}: {parent!r} is a value, not a section")
        values = values[parent]
    values[last] = value


def notify_config(assignments: Sequence[str]) -> NotifyConfig:
    """The section `notify` of some `a.b=value` assignments, without the configuration that they belong to."""
    values: dict[str, Any] = {}
    for text in assignments:
        if text.startswith("notify."):
            assign(values, *parse_assignment(text))
    config: NotifyConfig = validated(NotifyConfig, values.get("notify", {}))
    return config


def as_yaml(config: PipelineConfig) -> str:
    """The whole configuration as YAML, including defaults but no credentials."""
    return _yaml(config.model_dump(mode="json"))


def recorded_yaml(config: PipelineConfig) -> str:
    """`as_yaml` without added fields that have their defaults, for records that are compared."""
    return _yaml(recorded_fields(config))


def _yaml(values: Mapping[str, Any]) -> str:
    safe_values: Mapping[str, Any] = redacted_values(values)
    return yaml.safe_dump(dict(safe_values), sort_keys=False)

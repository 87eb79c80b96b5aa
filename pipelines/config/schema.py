"""PipelineConfig: the sections of every stage in one frozen schema, read from YAML files and `--set`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, field_validator, model_validator

from edt_core.config import (
    AutoencoderConfig,
    ClassifierConfig,
    EncodeConfig,
    PreprocessConfig,
    ReferenceConfig,
    SampleConfig,
    Section,
    SourceConfig,
    TrainConfig,
    ValidateConfig,
    added,
    recorded_fields,
    runtime,
)
from edt_core.diffusion import with_objective
from edt_core.errors import UserError
from edt_core.evaluation.config import EvaluateConfig
from edt_core.evaluation.extractors import INCEPTION
from edt_core.evaluation.metrics import metric_name, space_metrics
from edt_core.files.place_names import check_store_name
from edt_core.models import ModelConfig, check_masked_loss, model_config, paper_amm_blocks
from edt_core.printing.redaction import redacted_values
from edt_core.store.folder import Folder
from jobs.commands.options import parse_assignment, read_yaml, validated
from jobs.runtime.tracking import own_uri
from pipelines.config.networks import ExtractorConfig, ExtractorName, with_networks

DEFAULT_CONFIG = "quickstart"
_SHIPPED = Path(__file__).parents[1] / "configs"


class PromoteConfig(Section):
    """When a new version becomes champion, and what is written of it."""

    metric: str = Field("fd_classifier", description="the metric that decides")
    lower_is_better: bool = Field(
        True, description="whether the metric is a distance; false for precision, recall and scores"
    )
    margin: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="how much better than the champion, as a part of its value; null for more than two standard "
        "deviations of the repeats, or 0.01 where there is one repeat",
    )
    require: dict[str, tuple[float | None, float | None]] = Field(
        {}, description="metric -> [least, most] that every new champion keeps, null for no limit"
    )
    license: str | None = Field(None, description="of the model, for its card: an identifier, as apache-2.0")
    torch_export: bool = Field(
        False, description="keep the denoiser as a torch.export program as well: its weights a second time"
    )

    @model_validator(mode="after")
    def _limits_can_be_kept(self) -> "PromoteConfig":
        for metric, (least, most) in self.require.items():
            if least is not None and most is not None and least > most:
                raise ValueError(f"promote.require of {metric}: nothing is at least {least:g} and at most {most:g}")
        return self


class ValidationConfig(ValidateConfig):
    """How often the classifier takes samples, and real images, to be of their own class: a step beside `evaluate`."""

    enabled: bool = runtime(False, description="whether the step is called; it needs `classifier` in extractors")


class _UpToTheNetworks(Section):
    """The fields of a pipeline that stand before the sections of published networks of features."""

    name: str = runtime(..., description="by which runs are listed, schedules and --no-overlap tell pipelines apart")
    store: str = runtime("./edt-store", description="folder or URI of all artifacts")
    source: SourceConfig
    preprocess: PreprocessConfig = PreprocessConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    encode: EncodeConfig = EncodeConfig()
    extractors: tuple[ExtractorName, ...] = Field(
        ("classifier",), min_length=1, description="feature spaces in which samples and real images are compared"
    )
    classifier: ClassifierConfig = ClassifierConfig()


if TYPE_CHECKING:
    _WithNetworks = _UpToTheNetworks
else:
    _WithNetworks = with_networks(_UpToTheNetworks)


class PipelineConfig(_WithNetworks):
    """One pipeline: images to registered models."""

    reference: ReferenceConfig = ReferenceConfig()
    reference_statistics: str | None = runtime(
        None, description="ADM's .npz of Inception statistics (VIRTUAL_imagenet256_labeled.npz), in place of the images"
    )
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    validation: ValidationConfig = added(ValidationConfig())  # pydantic's sections have a method `validate`
    promote: PromoteConfig = PromoteConfig()
    models: dict[str, dict[str, Any]] = Field(
        min_length=1, description="registry name -> fields of `train` in which this model differs"
    )

    @field_validator("store")
    @classmethod
    def _can_be_recorded(cls, store: str) -> str:
        folder = Folder.at(store)
        if folder.local is not None:
            check_store_name(folder.local)
        own_uri(folder)
        return store

    @model_validator(mode="after")
    def _sizes_fit(self) -> "PipelineConfig":
        channels, sample = self.autoencoder.latent_channels, self.sample
        for name in self.models:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"the model name {name!r} is no registry name; use letters, digits, '.', '_' and '-'")
            train = self.train_of(name)
            check_masked_loss(self.model_of(name, 2), train.masked_loss)
            self.model_of(name, 2, self._amm_blocks(train.model))
            if sample.num_sampling_steps > train.num_timesteps:
                raise ValueError(
                    f"sample.num_sampling_steps {sample.num_sampling_steps} is more than the {train.num_timesteps} "
                    f"timesteps that {name} is trained with; use at most that"
                )
        if self.reference_statistics is not None and self.extractors != (INCEPTION,):
            raise ValueError(
                f"reference_statistics are of Inception features, and extractors are {list(self.extractors)}; set "
                "extractors to [inception], or compare with the images (reference_statistics: null)"
            )
        if (sample.guidance_channels or 1) > channels:
            raise ValueError(
                f"sample.guidance_channels {sample.guidance_channels} is more than the {channels} latent channels; "
                "use fewer, or null for all"
            )
        return self

    @model_validator(mode="after")
    def _the_reader_finds_its_shards(self) -> "PipelineConfig":
        streamed = [name for name in self.models if self.train_of(name).reader == "webdataset"]
        if streamed and not self.encode.write_webdataset:
            raise ValueError(
                f"train.reader of {streamed[0]} is webdataset, and encode.write_webdataset is false: there would be no "
                "tar to read; set encode.write_webdataset=true, or train.reader=arrow"
            )
        return self

    @model_validator(mode="after")
    def _the_deciding_metric_is_measured(self) -> "PipelineConfig":
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
                    f"promote.{field} {metric!r} is not among what is measured: {', '.join(measured)}; "
                    "choose one of these, or add it to evaluate.metrics and its space to extractors"
                )
        return self

    @model_validator(mode="after")
    def _the_classifier_validates(self) -> "PipelineConfig":
        if self.validation.enabled and "classifier" not in self.extractors:
            raise ValueError(
                f"validation.enabled is true, and extractors are {list(self.extractors)}: the classifier of the run is "
                "what validates the samples; add classifier to extractors, or set validation.enabled=false"
            )
        return self

    def _amm_blocks(self, model: str) -> tuple[int, ...]:
        """Blocks that sampling modulates in a named model; none for 'model'. Raises UserError as `paper_amm_blocks`."""
        blocks = self.sample.amm_blocks
        if blocks == "paper":
            return paper_amm_blocks(model, self.sample.cfg_scale, self.preprocess.image_size)
        return () if blocks == "model" else blocks

    def train_of(self, model: str) -> TrainConfig:
        """The training section of one registered model: the shared section with that model's fields."""
        train: TrainConfig = validated(TrainConfig, {**self.train.model_dump(), **self.models[model]})
        return train

    def model_of(self, model: str, num_classes: int, amm_blocks: Sequence[int] = ()) -> ModelConfig:
        """The EDT of one registered model. Raises ValueError where the sizes do not fit each other."""
        train = self.train_of(model)
        config = model_config(
            train.model,
            self.preprocess.image_size,
            num_classes,
            amm_blocks,
            autoencoder_factor=self.autoencoder.downsample_factor,
            latent_channels=self.autoencoder.latent_channels,
        )
        return with_objective(config, train.objective)

    def network(self, space: str) -> ExtractorConfig:
        """The section of a published network of features."""
        section: ExtractorConfig = getattr(self, space)
        return section

    @property
    def workers(self) -> int:
        """CPU workers that the largest stage wants at once."""
        train_workers = [self.train_of(name).worker_range[1] for name in self.models]
        return max(*train_workers, self.sample.num_workers, self.encode.num_workers, self.reference.num_workers)


def config_names() -> list[str]:
    """Names of the configurations that ship with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load_config(
    name_or_path: str = DEFAULT_CONFIG, assignments: Sequence[str] = (), store: str | None = None
) -> PipelineConfig:
    """A shipped configuration by name, or a YAML file, with `a.b=value` assignments on top.

    Raises UserError: no such configuration, not YAML, unknown keys, values that do not fit.
    """
    values = _read_yaml(name_or_path)
    for text in assignments:
        key, value = parse_assignment(text)
        _assign(values, key, value)
    if store is not None:
        values["store"] = store
    config: PipelineConfig = validated(PipelineConfig, values)
    return config


def _read_yaml(name_or_path: str, before: tuple[str, ...] = ()) -> dict[str, Any]:
    """A configuration's values. `base: NAME_OR_PATH` in it takes that configuration's values, with these on top."""
    if name_or_path in before:
        raise UserError(f"a configuration has itself as base: {' -> '.join([*before, name_or_path])}")
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.exists():
        values = read_yaml(path)
    elif name_or_path in config_names():
        values = read_yaml(_SHIPPED / f"{name_or_path}.yaml")
    else:
        known = ", ".join(config_names())
        raise UserError(f"no configuration {name_or_path!r}: it is neither a file nor one of {known}")
    if (base := values.pop("base", None)) is None:
        return values
    return _on_top(_read_yaml(str(base), (*before, name_or_path)), values)


def _on_top(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A base with other values on top: sections field by field, but the models as a whole."""
    merged = base | values
    for name, section in values.items():
        if isinstance(section, dict) and isinstance(base.get(name), dict) and name != "models":
            merged[name] = base[name] | section
    return merged


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values.setdefault(parent, {}), dict):
            raise UserError(f"--set {key}: {parent!r} is a value, not a section")
        values = values[parent]
    values[last] = value


def as_yaml(config: PipelineConfig) -> str:
    """The whole configuration, defaults included, as YAML. Credentials in it are left out."""
    return _yaml(config.model_dump(mode="json"))


def recorded_yaml(config: PipelineConfig) -> str:
    """The configuration as a record that is compared: as `as_yaml`, but for added fields that are at their default."""
    return _yaml(recorded_fields(config))


def _yaml(values: Mapping[str, Any]) -> str:
    shown: Mapping[str, Any] = redacted_values(values)
    return yaml.safe_dump(dict(shown), sort_keys=False)

"""PipelineConfig: the sections of every stage in one frozen schema, read from YAML and `--set`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from edt_core.config import (
    AutoencoderConfig,
    ClassifierConfig,
    EncodeConfig,
    EvaluateConfig,
    PreprocessConfig,
    ReferenceConfig,
    SampleConfig,
    Section,
    TrainConfig,
    runtime,
)
from edt_core.errors import UserError
from jobs.verb import parse_assignment, validated

DEFAULT_CONFIG = "quickstart"
_SHIPPED = Path(__file__).with_name("configs")


class SourceConfig(Section):
    """Where the labelled images come from."""

    kind: Literal["image_folder", "digits"] = "image_folder"
    path: str | None = Field(None, description="folder with one sub-folder a class")

    @model_validator(mode="after")
    def _folder_has_path(self) -> "SourceConfig":
        if self.kind == "image_folder" and not self.path:
            raise ValueError("source.path is missing: give the image folder, as --set source.path=/data/images")
        return self


class PromoteConfig(Section):
    """When a new version becomes champion."""

    metric: str = Field("fd_classifier", description="the metric that decides")
    lower_is_better: bool = True


class PipelineConfig(Section):
    """One pipeline: images to registered models."""

    name: str
    store: str = runtime("./edt-store", description="folder or URI of all artifacts")
    source: SourceConfig
    preprocess: PreprocessConfig = PreprocessConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    encode: EncodeConfig = EncodeConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    reference: ReferenceConfig = ReferenceConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromoteConfig = PromoteConfig()
    models: dict[str, dict[str, Any]] = Field(
        min_length=1, description="registry name -> fields of `train` in which this model differs"
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> "PipelineConfig":
        from edt_core.models import model_config

        size, factor = self.preprocess.image_size, self.autoencoder.downsample_factor
        for name in self.models:
            model_config(self.train_of(name).model, size, 2, autoencoder_factor=factor)
        return self

    def train_of(self, model: str) -> TrainConfig:
        """The training section of one registered model: the shared section with that model's fields."""
        train: TrainConfig = validated(TrainConfig, {**self.train.model_dump(), **self.models[model]})
        return train

    @property
    def workers(self) -> int:
        """CPU workers that the largest stage wants at once."""
        return max(self.train.num_workers, self.sample.num_workers, self.encode.num_workers)


def config_names() -> list[str]:
    """Names of the configurations that ship with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load_config(name_or_path: str = DEFAULT_CONFIG, assignments: Sequence[str] = ()) -> PipelineConfig:
    """A shipped configuration by name, or a YAML file, with `a.b=value` assignments on top.

    Raises UserError: no such configuration, not YAML, unknown keys, values that do not fit.
    """
    values = _read_yaml(name_or_path)
    for text in assignments:
        key, value = parse_assignment(text)
        _assign(values, key, value)
    config: PipelineConfig = validated(PipelineConfig, values)
    return config


def _read_yaml(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise UserError(f"the configuration file {path} does not exist")
        text = path.read_text()
    elif name_or_path in config_names():
        text = (_SHIPPED / f"{name_or_path}.yaml").read_text()
    else:
        raise UserError(
            f"no configuration {name_or_path!r}: it is neither a file nor one of {', '.join(config_names())}"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name_or_path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{name_or_path} holds no configuration: a mapping of sections is expected")
    return values


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values.setdefault(parent, {}), dict):
            raise UserError(f"--set {key}: {parent!r} is a value, not a section")
        values = values[parent]
    values[last] = value


def as_yaml(config: PipelineConfig) -> str:
    """The whole configuration, defaults included, as YAML."""
    dumped: Mapping[str, Any] = config.model_dump(mode="json")
    return yaml.safe_dump(dict(dumped), sort_keys=False)

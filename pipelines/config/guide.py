"""The section `sample` of a pipeline, which also names the model that samples are guided away from."""

import re
from typing import TYPE_CHECKING

from pydantic import Field

from edt_core.config import SampleConfig, Section, TrainConfig, names_input
from edt_core.store.layout import STEP_PREFIX

if TYPE_CHECKING:
    from pipelines.config.schema import PipelineConfig

OWN_SAMPLES = "own-samples"  # `sample.guide` of SIMS
_OTHER_SEED = 1 << 40  # between the seeds of samples that are measured and of those that are trained on
_STEP = re.compile(rf"{STEP_PREFIX}0*([1-9]\d*)")


class PipelineSampleConfig(SampleConfig):
    """The samples to draw: with the fields of the chain, the sampling protocol of a metric."""

    guide: str | None = names_input(
        None,
        min_length=1,
        description="weaker model that samples are guided away from, by cfg_scale (autoguidance, arXiv 2406.02507): a "
        "registered model (NAME@ALIAS, NAME/VERSION), a path, step-NNNNNNNN for an earlier checkpoint of the same "
        "training, or own-samples for a copy that is trained on samples of the model (SIMS, arXiv 2408.16333); null to "
        "guide away from no class",
    )

    @property
    def guide_step(self) -> int | None:
        """The step of the same training whose checkpoint is the guide; None for another model, or none."""
        match = _STEP.fullmatch(self.guide or "")
        return None if match is None else int(match[1])

    @property
    def guide_model(self) -> str | None:
        """Where the guide is, if it is not of the same training."""
        return self.guide if self.guide_step is None and self.guide != OWN_SAMPLES else None

    @property
    def own_samples(self) -> SampleConfig:
        """What a copy of the model is trained on with `own-samples`, but for their number: drawn without guidance."""
        values = {name: getattr(self, name) for name in SampleConfig.model_fields}
        alone = {"cfg_scale": 1.0, "guidance_interval": None, "guidance_reference": None, "cfg_power": None}
        others = {"repeats": 1, "keep_images": "all", "seed": self.seed + _OTHER_SEED}
        return SampleConfig(**{**values, **alone, **others})


class SimsConfig(Section):
    """SIMS (arXiv 2408.16333): with `sample.guide: own-samples`, the further training whose model is the guide."""

    num_samples: int = Field(10_000, ge=2, description="samples of the model that its copy is trained on")
    train_steps: int = Field(
        1_000, ge=1, description="steps of the copy's training, which has the recipe of the model's"
    )

    def training_of(self, train: TrainConfig) -> TrainConfig:
        """The training of the copy of a model: from its averaged weights, with its recipe but for what ends it."""
        ends = {"max_epochs": None, "max_hours": None, "patience": None, "keep_every": None}
        alone = {"holdout": 0.0, "validate_every": None, "align": None, "preview_every": None, "ema_widths": ()}
        start = {"init_weights": "ema", "init_optimizer": "fresh"}
        return train.model_copy(update={**ends, **alone, **start, "max_steps": self.train_steps})


def check_reference_of(config: "PipelineConfig") -> None:
    """Raise ValueError for guidance away from confused classes without a classifier, or without an effect."""
    chains = {"sample": config.sample, **({} if config.along.every is None else {"along": config.along})}
    for section, chain in chains.items():
        if chain.guidance_reference is None:
            continue
        if "classifier" not in config.extractors:
            raise ValueError(
                f"{section}.guidance_reference is confused, but extractors is {list(config.extractors)}, and the "
                "classifier of the run chooses the class; add classifier to extractors, or set guidance_reference=null"
            )
        if chain.cfg_scale == 1.0:
            raise ValueError(
                f"{section}.guidance_reference is confused, but {section}.cfg_scale is 1, which is no guidance; set "
                "cfg_scale above 1, or leave guidance_reference out"
            )


def check_guide_of(config: "PipelineConfig") -> None:
    """Raise ValueError for a guide without an effect, and for one that trainings do not keep."""
    sample = config.sample
    if sample.guide is None:
        return
    if sample.cfg_scale == 1.0:
        raise ValueError(
            f"sample.guide is {sample.guide}, but sample.cfg_scale is 1, which is no guidance; set cfg_scale above 1, "
            "such as 2, or leave the guide out"
        )
    if config.ladder.budgets and sample.guide_model is not None:
        raise ValueError(
            f"sample.guide is {sample.guide}, but the models of a ladder differ in size, and one guide would be weaker "
            "than some and stronger than others; use an earlier checkpoint of each, as step-00001000"
        )
    for name in config.models:
        train = config.train_of(name)
        if sample.guide == OWN_SAMPLES:
            _check_own(name, train)
        if sample.guide_step is not None:
            _check_step(sample.guide_step, name, train)


def _check_own(name: str, train: TrainConfig) -> None:
    """Raise ValueError for a model whose copy cannot be trained on its samples."""
    if train.trainable != "all":
        raise ValueError(
            f"sample.guide is {OWN_SAMPLES}, but {name} trains only some parameters (train.trainable "
            f"{train.trainable}); set train.trainable=all"
        )


def _check_step(step: int, name: str, train: TrainConfig) -> None:
    """Raise ValueError unless a training keeps the checkpoint of a step, with all its weights, until its end."""
    if train.trainable != "all":
        raise ValueError(
            f"sample.guide is the checkpoint of step {step}, but {name} trains only some parameters (train.trainable "
            f"{train.trainable}), and only its last model has all: name another model, or set train.trainable=all"
        )
    if train.keep_every is None or step % train.keep_every:
        keeps = "no earlier checkpoint" if train.keep_every is None else f"those of every {train.keep_every} steps"
        raise ValueError(
            f"sample.guide is the checkpoint of step {step}, but the training of {name} keeps {keeps} "
            f"(train.keep_every); set train.keep_every to a number that divides {step}"
        )
    if 0 < train.max_steps <= step:
        raise ValueError(
            f"sample.guide is the checkpoint of step {step}, but {name} trains {train.max_steps} steps "
            "(train.max_steps); name an earlier one"
        )

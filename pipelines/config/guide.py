"""The section `sample` of a pipeline, which also names the model that samples are guided away from."""

import re
from typing import TYPE_CHECKING

from edt_core.config import SampleConfig, TrainConfig, names_input
from edt_core.store.layout import STEP_PREFIX

if TYPE_CHECKING:
    from pipelines.config.schema import PipelineConfig

_STEP = re.compile(rf"{STEP_PREFIX}0*([1-9]\d*)")


class PipelineSampleConfig(SampleConfig):
    """The samples to draw: with the fields of the chain, the sampling protocol of a metric."""

    guide: str | None = names_input(
        None,
        min_length=1,
        description="weaker model that samples are guided away from, by cfg_scale (autoguidance, arXiv 2406.02507): a "
        "registered model (NAME@ALIAS, NAME/VERSION), a path, or step-NNNNNNNN for an earlier checkpoint of the same "
        "training; null to guide away from no class",
    )

    @property
    def guide_step(self) -> int | None:
        """The step of the same training whose checkpoint is the guide; None for another model, or none."""
        match = _STEP.fullmatch(self.guide or "")
        return None if match is None else int(match[1])

    @property
    def guide_model(self) -> str | None:
        """Where the guide is, if it is not of the same training."""
        return self.guide if self.guide_step is None else None


def check_reference_of(config: "PipelineConfig") -> None:
    """Raise ValueError for guidance away from confused classes without a classifier, or without an effect."""
    chains = {"sample": config.sample, **({} if config.along.every is None else {"along": config.along})}
    for section, chain in chains.items():
        if chain.guidance_reference == "null":
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
    if sample.guide_step is not None:
        for name in config.models:
            _check_step(sample.guide_step, name, config.train_of(name))


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

"""The section `prune` of a pipeline: the model that a training starts from is made shallower first."""

from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from edt_core.config import Section, TrainConfig, check_keep, recorded_fields, runtime

if TYPE_CHECKING:
    from edt_core.models import ModelConfig
    from pipelines.config.schema import PipelineConfig

_ALIGN = ("align", "align_block", "align_target_block", "align_features", "align_distance", "align_weight")
_USUAL = (  # fields of a training that learns which blocks to keep: those of its own, and what it does not have
    *("masked_loss", "trainable", "distill", "init_optimizer", "ema_widths", *_ALIGN),
    *("max_epochs", "max_hours", "patience", "keep_every", "preview_every", "seeds"),
)


class PruneConfig(Section):
    """Depth pruning (TinyFusion, arXiv 2412.01199): before a training, blocks of the model that it starts from go."""

    keep: tuple[int, int] | None = Field(
        None,
        description="[N, M]: of each M blocks in a row keep N, which a training of its own learns; `train` then is the "
        "fine-tuning of the model without the others, and train.model_overrides has its depth, as `edt prune` sets "
        "it. null for no pruning",
    )
    steps: int = Field(10_000, ge=1, description="steps in which it is learnt which blocks to keep")
    lr: float | None = Field(
        None, gt=0, description="peak learning rate of these steps; 10 times as much for the choices; null for train.lr"
    )
    uncut_amm_blocks: tuple[int, ...] | None = runtime(
        None,
        description="blocks with AMM where the model before the cut is measured beside the new one, by number; null "
        "for sample.amm_blocks",
    )

    @field_validator("keep")
    @classmethod
    def _keeps_some(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        return check_keep(value)

    def learning(self, train: TrainConfig, uncut: "ModelConfig") -> TrainConfig:
        """The training that learns which blocks of the model `uncut` to keep: the recipe of the fine-tuning, shorter.

        Its loss is that of the full pass alone, which is what is sampled.
        """
        from edt_core.models import overrides_record

        usual = TrainConfig.model_fields
        rate = self.lr or train.lr
        fields = {name: usual[name].default for name in _USUAL} | {
            "masked_loss": False,
            "max_steps": self.steps,
            "warmup_steps": min(train.warmup_steps, self.steps // 10),
            "lr": rate,
            "lr_final": min(train.lr_final, rate),
            "ema_decay": train.ema_decays[0],
            "model_overrides": overrides_record(uncut).get("model_overrides", {}),
            "amm_blocks": uncut.amm_blocks if uncut.amm_in_training else (),
            "init_weights": train.init_weights,
            "shard": "none" if train.shard == "full" else train.shard,
            "prune": self.keep,
        }
        return TrainConfig.model_validate({**recorded_fields(train), **fields})


def check_prune(config: "PipelineConfig") -> None:
    """Raise ValueError for trainings that cannot follow a cut."""
    for name in config.models:
        train = config.train_of(name)
        if train.prune is not None:
            raise ValueError(
                f"train.prune is {list(train.prune)} for {name}, but the model that it leaves must be fine-tuned; set "
                "prune.keep instead, or use `edt prune`"
            )
        if config.prune.keep is not None and (train.init_from is None or train.distill is not None):
            what = "train.init_from is null" if train.init_from is None else "train.distill is set"
            raise ValueError(
                f"prune.keep is {list(config.prune.keep)}, but {what} for {name}: the blocks of a trained model are "
                "pruned, and it is then trained on images; use `edt prune NAME@champion`"
            )

"""What a training keeps on disk, counted from its configuration: nothing is traced, so this takes milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from edt_core.models import ModelConfig, count_parameters, shadow
from edt_core.training.align.cost import head_parameters
from edt_core.training.align.settings import align_settings
from edt_core.training.optimizers.muon import hidden_matrices
from edt_core.training.posthoc.snapshots import snapshot_steps
from edt_core.training.start.trainable import count_trained

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

_OPTIMIZER_STATES = {"adan": 4, "adamw": 2, "muon": 2}  # float32 tensors of the size of the weights


@dataclass(frozen=True)
class Kept:
    """What a training keeps, in bytes: the weights of the model, those that are trained, and all that is resumed.

    `of_model`: the trained weights of the model; `trained`: with those of a head for alignment. `snapshot`: one
    snapshot of the power-function averages; `snapshots`: how many there are.
    """

    weights: int
    of_model: int
    trained: int
    optimizer: int
    ema: int
    snapshot: int
    snapshots: int
    steps: int

    @property
    def checkpoint(self) -> int:
        return self.trained + self.ema + self.optimizer


def kept(config: TrainConfig, model_config: ModelConfig, images: int) -> Kept:
    """What training a model on `images` images keeps."""
    weights = 4 * _parameters(model_config)
    of_model = weights if config.trainable == "all" else 4 * count_trained(config, model_config)
    trained = of_model + 4 * head_parameters(align_settings(config, model_config))
    optimizer = trained * _OPTIMIZER_STATES[config.optimizer]
    if config.optimizer == "muon":  # of its matrices, only a momentum
        optimizer -= 4 * _hidden(model_config)
    steps = config.total_steps(images)
    return Kept(
        weights=weights,
        of_model=of_model,
        trained=trained,
        optimizer=optimizer,
        ema=of_model * (len(config.ema_decays) + len(config.ema_widths)),
        snapshot=of_model // (1 if config.ema_snapshot_dtype == "fp32" else 2) * len(config.ema_widths),
        snapshots=len(snapshot_steps(config, steps)),
        steps=steps,
    )


@lru_cache(maxsize=64)
def _parameters(config: ModelConfig) -> int:
    return count_parameters(shadow(config))


@lru_cache(maxsize=64)
def _hidden(config: ModelConfig) -> int:
    return sum(matrix.numel() for matrix in hidden_matrices(shadow(config)))

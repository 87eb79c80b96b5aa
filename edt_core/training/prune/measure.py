"""What a cut costs and saves, measured in one go: the loss and the time of a model before and after it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edt_core.data.holdout import Holdout
from edt_core.data.latents import LatentDataset
from edt_core.models import DiffusionTransformer, ModelConfig, build_model
from edt_core.training.ranks import Ranks
from edt_core.training.speed.arithmetic import set_arithmetic
from edt_core.training.validation.measure import HeldOutLoss
from edt_core.training.validation.overfitting import HELD_OUT_LOSS

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

_IMAGES = 16  # of the loss, each at 8 times; and of the batch that is timed
_FEWEST, _MOST, _SECONDS = 3, 20, 5.0  # runs of each model that are timed, and when they may end

Weighted = tuple[ModelConfig, Mapping[str, Tensor]]


def models_of(config: TrainConfig, weighted: Sequence[Weighted]) -> list[DiffusionTransformer]:
    """Models with these weights, on the GPU if there is one, as they are sampled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = []
    for model_config, weights in weighted:
        with torch.random.fork_rng(devices=[]):  # its initial weights are not used
            model = build_model(model_config)
        model.load_state_dict(dict(weights))
        set_arithmetic(model, config)
        models.append(model.eval().requires_grad_(False).to(device))
    return models


@torch.no_grad()
def seconds_of(models: Sequence[DiffusionTransformer]) -> list[float]:
    """Seconds of a forward pass for an image, of each model: the fastest of some runs, which take turns.

    Of small models there are many runs, so that other programs disturb few of them.
    """
    times: list[list[float]] = [[] for _ in models]
    started, inputs = time.perf_counter(), [_inputs(model) for model in models]
    for run in range(_MOST + 1):  # the first one also allocates
        if run > _FEWEST and time.perf_counter() - started > _SECONDS:
            break
        for model, own, given in zip(models, times, inputs, strict=True):
            began = time.perf_counter()
            float(model(*given).sum())  # waits for the device
            own.append(time.perf_counter() - began)
    return [min(own[1:]) / _IMAGES for own in times]


def losses_of(config: TrainConfig, dataset: LatentDataset, weighted: Sequence[Weighted]) -> list[float]:
    """The mean squared error of each model's prediction for the same images, times and noise."""
    rows = np.linspace(0, len(dataset) - 1, min(_IMAGES, len(dataset))).astype(np.int64)
    digests = np.stack([np.frombuffer(sha256(str(row).encode()).digest(), np.uint8) for row in rows.tolist()])
    chosen = Holdout(rows, rows, digests)
    return [
        HeldOutLoss(config, model_config, dataset, chosen, Ranks()).measure(weights)[HELD_OUT_LOSS]
        for model_config, weights in weighted
    ]


def _inputs(model: DiffusionTransformer) -> tuple[Tensor, Tensor, Tensor]:
    config, device = model.config, next(model.parameters()).device
    x = torch.zeros(_IMAGES, config.in_channels, config.latent_size, config.latent_size, device=device)
    t, y = (torch.zeros(_IMAGES, dtype=torch.int64, device=device) for _ in range(2))
    return x, t, y

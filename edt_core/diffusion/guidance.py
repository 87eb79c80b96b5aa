"""Guidance, away from the prediction without a label or from that of a weaker model.

References: Ho & Salimans 2022 (classifier-free guidance, arXiv 2207.12598), Kynkäänniemi et al. 2024 (guidance in an
interval, arXiv 2404.07724), Karras et al. 2024 (autoguidance, arXiv 2406.02507), Gao et al. 2023 (guidance that grows,
arXiv 2303.14389).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from edt_core.diffusion.chain import ModelFn, SwitchedModel
from edt_core.errors import UserError

# (x [N, C, H, W], t [N], y [N]) -> the model's output [N, outputs * C, H, W]
ClassModel = Callable[[Tensor, Tensor, Tensor], Tensor]
Progress = Callable[[Tensor], Tensor]  # t [N] -> the share of the way from noise to data [N]


def guided(
    model: ClassModel,
    y: Tensor,
    null_label: int,
    cfg_scale: float,
    channels: int | None = 3,
    *,
    interval: tuple[float, float] | None = None,
    guide: ClassModel | None = None,
    growth: tuple[float, Progress] | None = None,
    whole_output: bool = False,
) -> ModelFn | SwitchedModel:
    """The model bound to labels y, int64 [N], and guided away from its prediction without a label.

    The guided noise is eps_null + cfg_scale (eps_y - eps_null), which is eq. 6 of Ho & Salimans with cfg_scale =
    1 + w. It replaces the first `channels` channels of the noise, or all of them if `channels` is None;
    the others, and the variance, are the conditional ones. Published results of DiT and EDT use three channels. Any
    other prediction, such as v, is guided in the same way, with the same guided noise: at a given x_t the noise is an
    affine function of it.
    Both halves go through the model in one call, the labelled half first. With cfg_scale 1 there is no guidance, and
    the model is called with y alone.
    `guide`: a weaker model of the same latents and classes, whose eps_guide replaces eps_null (Karras 2024, eq. 2).
    Both models get y, and no null label is used.
    `interval`: guide only at times in [from, to), timesteps of training or the time of a flow; at others the model is
    called with y alone, at half the cost. The result is then a SwitchedModel, for a chain.
    `whole_output`: guide all channels of the output, such as logits, and not the leading ones of the latents' shape.
    `growth`: (power, progress) of a scale that grows along the chain, see `power_cosine_scale`.
    Raises UserError for fewer than one channel and an empty interval, and, when called, for more channels than the
    latents have.
    """
    if channels is not None and channels < 1:
        raise UserError(f"guidance on {channels} channels has no effect. Use cfg_scale=1 for no guidance.")
    if interval is not None and not interval[0] < interval[1]:
        raise UserError(f"guidance in the interval {list(interval)} has no effect: use [from, to) with from < to.")

    def plain(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, y)

    if cfg_scale == 1.0:
        return plain
    pair = _with_null_label(model, y, null_label) if guide is None else _with_guide(model, guide, y)

    def push(x: Tensor, t: Tensor) -> Tensor:
        count = x.shape[1] if channels is None else channels
        if count > x.shape[1]:
            raise UserError(
                f"guidance on {count} channels, but the latents have {x.shape[1]}. Use channels=None for all."
            )
        conditional, other = pair(x, t)
        count = conditional.shape[1] if whole_output else count
        base = other[:, :count]
        scale = cfg_scale if growth is None else _grown(cfg_scale, t, *growth)
        eps = base + scale * (conditional[:, :count] - base)
        return torch.cat([eps, conditional[:, count:]], dim=1)

    return push if interval is None else SwitchedModel(push, plain, interval)


def power_cosine_scale(cfg_scale: float, progress: Tensor, power: float) -> Tensor:
    """Guidance scales [N] that grow from 1 at pure noise (progress 0) to cfg_scale at the image (1).

    1 + (cfg_scale - 1) (1 - cos(π progress^power)) / 2, with progress [N] = 1 - t / num_timesteps in MDT (arXiv
    2303.14389, power-cosine).
    """
    return 1 + (cfg_scale - 1) * (1 - torch.cos(math.pi * progress**power)) / 2


def _grown(cfg_scale: float, t: Tensor, power: float, progress: Progress) -> Tensor:
    return power_cosine_scale(cfg_scale, progress(t), power).view(-1, 1, 1, 1)


_Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (x, t) -> the predictions to guide towards and away from


def _with_null_label(model: ClassModel, y: Tensor, null_label: int) -> _Pair:
    labels = torch.cat([y, torch.full_like(y, null_label)])

    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        conditional, unconditional = model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        return conditional, unconditional

    return pair


def _with_guide(model: ClassModel, guide: ClassModel, y: Tensor) -> _Pair:
    return lambda x, t: (model(x, t, y), guide(x, t, y))

"""Guidance, away from the prediction without a label, from that of a weaker model, or from that of a confused class.

References: Ho & Salimans 2022 (classifier-free guidance, arXiv 2207.12598), Kynkäänniemi et al. 2024 (guidance in an
interval, arXiv 2404.07724), Karras et al. 2024 (autoguidance, arXiv 2406.02507), Gao et al. 2023 (guidance that grows,
arXiv 2303.14389), Shenoy et al. 2024 (gradient-free classifier guidance, arXiv 2411.15393).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edt_core.diffusion.chain import ModelFn, SwitchedModel
from edt_core.errors import UserError

# (x [N, C, H, W], t [N], y [N]) -> the model's output [N, outputs * C, H, W]
ClassModel = Callable[[Tensor, Tensor, Tensor], Tensor]
Progress = Callable[[Tensor], Tensor]  # t [N] -> the share of the way from noise to data [N]
# (x [N, C, H, W], t [N], the model's output for y) -> probabilities of the classes for the data it implies, [N, K]
Classified = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Confused:
    """Gradient-free classifier guidance: `classify` the prediction, and guide away from the class it is confused with.

    `reference` predicts for that class: the model itself, or a weaker one, which then is the `guide`.
    """

    classify: Classified
    reference: ClassModel
    by_guide: bool = False


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
    confused: Confused | None = None,
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
    `confused`: guide away from the class that a classifier confuses each sample with, see `confusion`. The model is
    called with y first, and then with those classes; no null label is used.
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
    if confused is not None:
        pair = _with_confused_class(model, confused, y)
    else:
        pair = _with_null_label(model, y, null_label) if guide is None else _with_guide(model, guide, y)

    def push(x: Tensor, t: Tensor) -> Tensor:
        count = x.shape[1] if channels is None else channels
        if count > x.shape[1]:
            raise UserError(
                f"guidance on {count} channels, but the latents have {x.shape[1]}. Use channels=None for all."
            )
        conditional, other, doubt = pair(x, t)
        count = conditional.shape[1] if whole_output else count
        base = other[:, :count]
        scale = cfg_scale if growth is None else _grown(cfg_scale, t, *growth)
        if doubt is not None:
            scale = 1 + (scale - 1) * doubt.view(-1, 1, 1, 1)
        eps = base + scale * (conditional[:, :count] - base)
        return torch.cat([eps, conditional[:, count:]], dim=1)

    return push if interval is None else SwitchedModel(push, plain, interval)


def power_cosine_scale(cfg_scale: float, progress: Tensor, power: float) -> Tensor:
    """Guidance scales [N] that grow from 1 at pure noise (progress 0) to cfg_scale at the image (1).

    1 + (cfg_scale - 1) (1 - cos(π progress^power)) / 2, with progress [N] = 1 - t / num_timesteps in MDT (arXiv
    2303.14389, power-cosine).
    """
    return 1 + (cfg_scale - 1) * (1 - torch.cos(math.pi * progress**power)) / 2


def confusion(probabilities: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The class that each sample is confused with, int64 [N], and how much, [N], from probabilities [N, K] and y [N].

    Gradient-free classifier guidance (arXiv 2411.15393) runs a classifier on the data that the present prediction
    implies, and finds from its probabilities p, without a gradient, a reference class and a guidance scale for each
    sample and step. By its abstract both change along the chain, and the scale is larger the more the sample is
    confused. Its equations were not available as text, so the forms are this project's:

    - reference class: the most probable one besides y;
    - doubt: 1 - p_y. Guidance with scale w becomes D(y) + (w - 1) (1 - p_y) (D(y) - D(reference)), so that a sample the
      classifier is sure of is not guided, and w is the scale of one that is certainly of another class;
    - with a weaker model (their combination with autoguidance, at no further cost): it predicts for the reference class
      where that is more probable than y, and for y elsewhere, and the scale is w everywhere.
    """
    own = y[:, None]
    return probabilities.scatter(1, own, -1.0).argmax(1), 1 - probabilities.gather(1, own).squeeze(1)


def _grown(cfg_scale: float, t: Tensor, power: float, progress: Progress) -> Tensor:
    return power_cosine_scale(cfg_scale, progress(t), power).view(-1, 1, 1, 1)


# (x, t) -> the predictions to guide towards and away from, and a factor [N] on the extrapolation, None for 1
_Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]


def _with_null_label(model: ClassModel, y: Tensor, null_label: int) -> _Pair:
    labels = torch.cat([y, torch.full_like(y, null_label)])

    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, None]:
        conditional, unconditional = model(torch.cat([x, x]), torch.cat([t, t]), labels).chunk(2)
        return conditional, unconditional, None

    return pair


def _with_guide(model: ClassModel, guide: ClassModel, y: Tensor) -> _Pair:
    return lambda x, t: (model(x, t, y), guide(x, t, y), None)


def _with_confused_class(model: ClassModel, confused: Confused, y: Tensor) -> _Pair:
    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        conditional = model(x, t, y)
        probabilities = confused.classify(x, t, conditional).to(x)
        other, doubt = confusion(probabilities, y)
        if confused.by_guide:
            other = torch.where(probabilities.argmax(1) == y, y, other)
        return conditional, confused.reference(x, t, other), None if confused.by_guide else doubt

    return pair

"""The sampler of masked tokens: unmask all positions in the order of a Halton sequence (arXiv 2503.17076).

The positions of each step are fixed, and far from one another, so that codes drawn at once depend little on each other.
How many are masked at which time is the arccos schedule: the share 2 / π arccos(r) after the share r of the steps.

Legend: N samples, h side of the grid, T = h² positions, K codes.
"""

import math
from functools import lru_cache, partial
from itertools import count, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edt_core.diffusion.chain import Chain, ModelFn, NoiseFn, ProgressFn, SwitchedModel, model_at
from edt_core.errors import UserError
from edt_core.models.families.codes import MASKED, values_of

_ROUNDING = 1e-9  # arccos(1/2) is π/3 but for the last bit, and a third of the positions would be one too few


def masked_share(time: Tensor) -> Tensor:
    """The share of masked positions at times [N] from 0 to 1: all at 0, none at 1."""
    return torch.arccos(time.float()) * (2 / math.pi)


def unmasked_after(positions: int, num_steps: int) -> list[int]:
    """How many of the positions are unmasked after each of the steps; at least one in each."""
    shares = (1 - math.acos(step / num_steps) * 2 / math.pi for step in range(1, num_steps + 1))
    return [max(step, int(share * positions + _ROUNDING)) for step, share in enumerate(shares, start=1)]


@lru_cache(maxsize=8)
def halton_order(side: int) -> NDArray[np.int64]:
    """All positions of a square, int64 [T]: row * side + column, in the order of the points of the Halton sequence.

    The row of point i is that of its radical inverse in base 2, the column in base 3. Points in a cell that had one
    before are left out. Computed in integers, so without rounding.
    """
    order: dict[int, None] = {}
    for number in count(1):
        row, column = (_cell(number, base, side) for base in (2, 3))
        order.setdefault(row * side + column)
        if len(order) == side * side:
            break
    return np.array(list(order), np.int64)


def _cell(number: int, base: int, side: int) -> int:
    """The cell, of `side` in 0..1, of the radical inverse of a number: its digits mirrored at the point."""
    numerator, denominator = 0, 1
    while number:
        number, digit = divmod(number, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return side * numerator // denominator


def halton_chain(num_steps: int, temperature: float) -> Chain:
    """The sampler with `num_steps` steps. It draws no noise of its own: the start decides everything.

    A position is drawn once, from the normal number at its place in the first channel of the start.
    """
    return Chain(num_steps, 0, partial(_run, num_steps, temperature))


@torch.no_grad()
def _run(
    num_steps: int,
    temperature: float,
    model_fn: ModelFn | SwitchedModel,
    initial: Tensor,
    noise: NoiseFn | None,
    progress: ProgressFn | None,
) -> Tensor:
    """Values [N, 4, h, h] float32 of all positions. Raises UserError for more steps than positions."""
    rows, _, side, _ = initial.shape
    check_steps(num_steps, side)
    order = torch.from_numpy(halton_order(side)).to(initial.device)
    uniforms = torch.special.ndtr(initial[:, 0].double()).flatten(1)
    x = torch.full_like(initial, MASKED, dtype=torch.float32, memory_format=torch.contiguous_format)
    places = x.view(rows, -1, side * side)
    for step, (begin, end) in enumerate(pairwise([0, *unmasked_after(side * side, num_steps)])):
        time, chosen = step / num_steps, order[begin:end]
        logits = model_at(model_fn, time)(x, torch.full((rows,), time, device=x.device))
        codes = drawn(logits.flatten(2)[:, :, chosen].mT, uniforms[:, chosen], temperature)
        places[:, :, chosen] = values_of(codes)
        if progress is not None:
            progress(step + 1, num_steps)
    return x


def drawn(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Codes [N, n] from softmax(logits / temperature), logits [N, n, K], for uniform numbers [N, n] in [0, 1).

    The code is the first whose cumulative probability is above the number; in float64, whose rounding errors are below
    the distance of two uniform numbers.
    """
    below_best = logits.double() - logits.amax(-1, keepdim=True).double()  # finite at the best for any temperature
    cumulative = torch.softmax(below_best / temperature, dim=-1).cumsum(-1)
    bounds = (uniforms * cumulative[..., -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative, bounds, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


def check_steps(num_steps: int, side: int) -> None:
    """Raise UserError for more steps than there are positions to unmask."""
    if num_steps > side * side:
        raise UserError(
            f"num_sampling_steps is {num_steps}, but the sampler halton unmasks at least one position in each step, "
            f"and there are {side} x {side}; use at most {side * side}"
        )

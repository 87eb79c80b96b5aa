"""Codes of finite scalar quantization (FSQ, arXiv 2309.15505): integers, and the values of four channels in -1..1.

A channel with L levels has the values (d - L // 2) / (L // 2) with a digit d in 0..L-1. They are exact in every
floating-point format. A code is the integer with these digits, the first channel's is the least.

Legend: N samples, h side of the grid of codes. Values [N, 4, h, h] float, codes [N, h, h] int64.
"""

import math
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

LEVELS = (8, 5, 5, 5)  # for about 2^10 codes: table 1 of the paper
NUM_CODES = math.prod(LEVELS)
MASKED = 2.0  # the value of all channels at a masked position, which no code has
_PLACES = tuple(accumulate(LEVELS[:-1], mul, initial=1))  # of the digits: 1, 8, 40, 200
_MARGIN = 1e-3  # by which the bounds are within the outermost half steps, where rounding would leave the levels


def quantized(z: Tensor) -> Tensor:
    """Values [N, 4, h, h] of real numbers [N, 4, h, h]: bounded, rounded to the levels, and scaled (section 3.1).

    The gradient of the rounding is that of the identity.
    """
    channels = []
    for levels, channel in zip(LEVELS, z.unbind(1), strict=True):
        half, offset = (levels - 1) * (1 - _MARGIN) / 2, 0.5 * (1 - levels % 2)
        bounded = torch.tanh(channel + math.atanh(offset / half)) * half - offset  # 0 stays 0
        channels.append((bounded + (bounded.round() - bounded).detach()) / (levels // 2))
    return torch.stack(channels, dim=1)


def codes_of(values: Tensor) -> Tensor:
    """Codes [N, h, h] of values [N, 4, h, h]; of other values that of the nearest levels."""
    digits = (
        ((channel.float() * (levels // 2)).round().long() + levels // 2).clamp(0, levels - 1) * place
        for levels, place, channel in zip(LEVELS, _PLACES, values.unbind(1), strict=True)
    )
    return torch.stack(list(digits)).sum(0)


def values_of(codes: Tensor) -> Tensor:
    """Values [N, 4, ...] float32 of codes [N, ...]."""
    digits = (codes // place % levels for levels, place in zip(LEVELS, _PLACES, strict=True))
    return torch.stack([(d - n // 2).float() / (n // 2) for d, n in zip(digits, LEVELS, strict=True)], dim=1)


def is_masked(values: Tensor) -> Tensor:
    """Where values [N, 4, h, h] are those of a masked position, bool [N, h, h]."""
    return values[:, 0] > (1 + MASKED) / 2

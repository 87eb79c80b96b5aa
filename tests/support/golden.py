"""Reference vectors: where they are, the weights they were made with, and how far from them is measured."""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


def formula_weight(key: str, shape: torch.Size) -> Tensor:
    """The weights of the reference: normal draws seeded by the key, with the spread of a trained model."""
    if key.endswith("relative_position_bias_table"):
        std = 0.5
    elif len(shape) > 1:
        std = float(np.prod(shape[1:])) ** -0.5
    else:
        std = 0.1
    draw = np.random.RandomState(zlib.crc32(key.encode())).randn(*shape) * std
    return torch.from_numpy(draw.astype(np.float32))


def relative_error(actual: Tensor, expected: np.ndarray) -> float:
    return float(np.abs(actual.detach().numpy() - expected).max() / np.abs(expected).max())

"""Where a model masks tokens, and the form of its masks; defined by each family that has masks.

Legend: N = batch, T = tokens at a site.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

RatioRange = tuple[float, float]


@dataclass(frozen=True)
class MaskSite:
    """A place in the forward pass that masks tokens.

    `module` is the name of the module that masks its input, or of the embedding that masks its output, as in
    `named_modules()`; `ratio_range` bounds the share of its `tokens` that is masked.
    """

    module: str
    tokens: int
    ratio_range: RatioRange


class MaskForm(ABC):
    """The form of a family's masks. `described` completes "takes 2 ... [256, 64] tokens" in a message."""

    dtype: ClassVar[torch.dtype]
    described: ClassVar[str]

    @abstractmethod
    def draw(self, uniform: Tensor, ratio: Tensor) -> Tensor:
        """The mask of a site from uniform numbers [N, T] in 0..1 and a mask ratio []."""

    @abstractmethod
    def columns(self, tokens: int, ratio: float) -> int:
        """Number of columns of a mask for `tokens` tokens at a mask ratio."""

    @abstractmethod
    def fits(self, columns: int, tokens: int) -> bool:
        """Whether a mask of `columns` columns is valid for a site of `tokens` tokens."""

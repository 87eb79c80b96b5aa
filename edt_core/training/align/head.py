"""The head of an alignment, and the model with it: what an optimizer trains and DDP wraps.

Legend: N = batch, n = its rows of the full pass, T = tokens of a grid of n x n, K = features of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isqrt

from torch import Tensor, nn

from edt_core.data.randomness import generator
from edt_core.models import DiffusionTransformer
from edt_core.models.attention import Attention
from edt_core.models.base import WatchedBlock
from edt_core.store.layout import ALIGN_HEAD


def projection_head(widths: Sequence[int], seed: int) -> nn.Sequential:
    """Linear layers of these widths with SiLU between them; Xavier weights that depend on the seed, biases of 0.

    Layers and initial weights are those of SRA's and REPA's heads (arXiv 2505.02831, 2410.06940).
    """
    layers: list[nn.Module] = []
    source = generator(seed, 0, "align_head")
    for width, out in pairwise(widths):
        linear = nn.utils.skip_init(nn.Linear, width, out)
        nn.init.xavier_uniform_(linear.weight, generator=source)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class BlockOutput:
    """Keeps the output of a model's block, the first being 1, of each forward pass, which it may end."""

    def __init__(self, model: DiffusionTransformer, block: int, *, ends: bool = False) -> None:
        attention: Attention = model.attentions()[block - 1]
        self._extra = attention.extra_tokens
        self._watched = model.watched = WatchedBlock(model.ordered_blocks()[block - 1], ends)

    def take(self, rows: int | None = None) -> Tensor:
        """The patches' tokens [n, T, K] of the first rows, or all, in the last forward pass; to be taken once.

        A model may call a block for masked rows first and for the others after them, as MDTv2 does.
        """
        output, self._watched.output = self._watched.output, None
        assert output is not None, "no forward pass since the last call"
        return output[:rows, self._extra :]


class AlignedModel(nn.Module):
    """A model whose forward pass also returns the head's output for the hidden states of one block.

    The parameters of the head belong to the training alone: `model` is the model that is averaged and stored.
    """

    file = ALIGN_HEAD

    def __init__(self, model: DiffusionTransformer, head: nn.Sequential, block: int) -> None:
        super().__init__()
        self.model, self.head = model, head
        self._hidden = BlockOutput(model, block)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, masks: Sequence[Tensor] | None, rows: int
    ) -> tuple[Tensor, Tensor]:
        """The model's output, and the head's [n, T, K] for the first `rows` rows, which have no mask."""
        output = self.model(x, t, y, masks)
        return output, self.head(self._hidden.take(rows))


def averaged(tokens: Tensor, grid: int) -> Tensor:
    """Tokens [N, G², K] averaged over the cells of a coarser grid that divides theirs: [N, grid², K]."""
    side = isqrt(tokens.shape[1])
    if side == grid:
        return tokens
    cells = tokens.unflatten(1, (grid, side // grid, grid, side // grid))
    return cells.mean(dim=(2, 4)).flatten(1, 2)

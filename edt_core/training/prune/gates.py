"""A model whose units are gated while a training learns which of them to leave out (TinyFusion, arXiv 2412.01199).

Each group has a categorical distribution over its candidates, all sets of N of its M units. For each sample one
candidate is drawn by the Gumbel-softmax, straight through: forward the gates are exactly 0 or 1, backward the gradient
is that of the softmax. The weights are trained at the same time, in place of the fine-tuning after the cut: what is
minimised is the loss that a cut model recovers to, and not its loss right after the cut.

Legend: N = samples, K = candidates of all groups, U = units of all runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from edt_core.models import DiffusionTransformer, ModelConfig
from edt_core.store.layout import DEPTH_LOGITS
from edt_core.training.prune.groups import Group, depth_of, groups_of

SCALE = 100.0  # of the logits before the softmax, as the authors set it; after arXiv 2409.17481
RATE = 10.0  # the learning rate of the logits over that of the weights, as the authors set it
_FIRST, _LAST = 4.0, 0.1  # temperature at the first and the last step, linear between, as the authors set it
_LEAST = 2.0**-26  # of a uniform number, whose logarithm is taken


def temperature(step: int, steps: int) -> float:
    """Of the Gumbel-softmax at a step, the first being 0, of so many."""
    return _FIRST + (_LAST - _FIRST) * step / max(steps - 1, 1)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel numbers from uniform ones in 0..1."""
    return -(-uniform.clamp(min=_LEAST).log()).log()


def count_candidates(config: ModelConfig, keep: tuple[int, int]) -> int:
    """K of a model."""
    return sum(len(group.candidates) for group in groups_of(config, keep))


class DepthGates(nn.Module):
    """The logits [K] of all candidates, group by group: equally likely at first."""

    options: Tensor

    def __init__(self, groups: tuple[Group, ...]) -> None:
        super().__init__()
        sizes = [len(group.candidates) for group in groups]
        self._sizes = sizes
        self.logits = nn.Parameter(torch.zeros(sum(sizes)))
        blocks = [
            torch.tensor([[float(unit in kept) for unit in group.units] for kept in group.candidates])
            for group in groups
        ]
        self.register_buffer("options", torch.block_diag(*blocks), persistent=False)  # [K, U]

    def forward(self, noise: Tensor, tau: float) -> Tensor:
        """The gate of each unit, [N, U], 0 or 1, for Gumbel numbers [N, K] at a temperature."""
        soft = torch.cat(
            [part.softmax(dim=1) for part in ((SCALE * self.logits + noise) / tau).split(self._sizes, dim=1)], dim=1
        )
        hard = torch.cat(
            [torch.zeros_like(part).scatter(1, part.argmax(1, True), 1.0) for part in soft.split(self._sizes, dim=1)],
            dim=1,
        )
        return (hard + (soft - soft.detach())) @ self.options  # exactly 0 and 1, unlike hard - soft + soft

    def probabilities(self) -> list[list[float]]:
        """Those of each group's candidates."""
        return probabilities(self.logits.detach(), self._sizes)


def probabilities(logits: Tensor, sizes: list[int]) -> list[list[float]]:
    """The probabilities of each group's candidates, of logits [K]."""
    return [part.softmax(dim=0).tolist() for part in (SCALE * logits.double().cpu()).split(sizes)]


class GatedModel(nn.Module):
    """A model whose units are skipped where their gate is 0. `head` are its gates, which an optimizer trains too."""

    file = DEPTH_LOGITS

    def __init__(self, model: DiffusionTransformer, keep: tuple[int, int]) -> None:
        super().__init__()
        config = model.config
        self.model, self.head = model, DepthGates(groups_of(config, keep))
        units = [unit for run in depth_of(config).runs(config) for unit in run]
        self._unit = {model.get_submodule(name): number for number, unit in enumerate(units) for name in unit}

    def forward(self, x: Tensor, t: Tensor, y: Tensor, noise: Tensor, tau: float) -> Tensor:
        """The model's output for the candidates that Gumbel numbers [N, K] choose for each sample."""
        with torch.autocast(x.device.type, enabled=False):
            gates: Tensor = self.head(noise, tau)

        def mix(block: nn.Module, tokens: Tensor, compute: Callable[[], Tensor]) -> Tensor:
            if (unit := self._unit.get(block)) is None:
                return compute()
            gate = gates[:, unit].view(-1, 1, 1).to(tokens.dtype)
            return compute() * gate + tokens * (1 - gate)

        self.model.predict_block = mix
        try:
            out: Tensor = self.model(x, t, y)
        finally:
            self.model.predict_block = None
        return out

"""The blocks of a model that may be left out, and the configuration of the model without them.

A *unit* is the blocks that are left out together: a single one, or two that a long skip joins. A *run* is units in a
row between which the tokens keep their shape, so that any of them can be left out. A unit is written as the names of
its modules, as in `named_modules()`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edt_core.models.config import ModelConfig

Unit = tuple[str, ...]
Runs = tuple[tuple[Unit, ...], ...]


class Depth(ABC):
    """How a family counts its blocks. `field` is that of the configuration with the number of blocks."""

    field: str

    @abstractmethod
    def runs(self, config: Any) -> Runs:
        """The runs of a model of this family, in forward order."""

    @abstractmethod
    def fields(self, config: Any, counts: Sequence[int]) -> dict[str, Any]:
        """The fields of the model that has so many units in each run, where they differ from those of `config`."""

    def shallower(self, config: ModelConfig, counts: Sequence[int]) -> ModelConfig:
        """The configuration of the model with so many units in each run, without AMM."""
        return replace(config, amm_blocks=(), amm_in_training=False, **self.fields(config, counts))


class OneRun(Depth):
    """A family whose blocks are all in `blocks`, one after the other."""

    field = "depth"

    def runs(self, config: Any) -> Runs:
        """All blocks."""
        return (tuple((f"blocks.{index}",) for index in range(config.depth)),)

    def fields(self, config: Any, counts: Sequence[int]) -> dict[str, Any]:
        """The depth."""
        return {"depth": counts[0]}


def joined_pairs(first: str, second: str, count: int) -> tuple[Unit, ...]:
    """The run of `count` pairs whose long skips lead from the blocks of one list to those of another, in reverse."""
    return tuple((f"{first}.{index}", f"{second}.{count - 1 - index}") for index in range(count))

"""The model that is left when some units of a model are left out: an ordinary model of the same family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from edt_core.models import ModelConfig, shadow
from edt_core.training.prune.groups import Group, counts_of, depth_of

Kept = tuple[tuple[int, ...], ...]  # the numbers of the units that are kept, of each run, in order


def most_likely(groups: Sequence[Group], probabilities: Sequence[Sequence[float]]) -> Kept:
    """The units of the most likely candidate of each group; of equally likely ones the first."""
    runs: dict[int, list[int]] = {}
    for group, values in zip(groups, probabilities, strict=True):
        best = max(range(len(values)), key=lambda index: (values[index], -index))
        runs.setdefault(group.run, []).extend(group.candidates[best])
    return tuple(tuple(units) for _, units in sorted(runs.items()))


def shallower(config: ModelConfig, keep: tuple[int, int]) -> ModelConfig:
    """The configuration of a model that keeps N of M units. It does not depend on which.

    A placement of AMM moves with its place in the run: that of the i-th of n units is on unit i n' // n of the n' that
    are left.
    """
    cut = depth_of(config).shallower(config, counts_of(config, keep))
    moved = moved_blocks(config, cut, config.amm_blocks)
    return replace(cut, amm_blocks=moved, amm_in_training=config.amm_in_training)


def moved_blocks(config: ModelConfig, cut: ModelConfig, blocks: Sequence[int]) -> tuple[int, ...]:
    """The blocks of a model with fewer units at the places of `blocks`; both are numbers over all blocks."""
    if not blocks:
        return ()
    depth = depth_of(config)
    places = {
        name: after[number * len(after) // len(before)][member]
        for before, after in zip(depth.runs(config), depth.runs(cut), strict=True)
        for number, unit in enumerate(before)
        for member, name in enumerate(unit)
    }
    names, numbers = _names(config), {name: number for number, name in enumerate(_names(cut))}
    return tuple(sorted({numbers[places.get(names[block], names[block])] for block in blocks}))


def cut_weights(weights: Mapping[str, Tensor], config: ModelConfig, cut: ModelConfig, kept: Kept) -> dict[str, Tensor]:
    """The state dict of the model `cut`: the weights of the kept units under their new names, and all others as is."""
    depth, names = depth_of(config), dict[str, str]()
    for before, after, units in zip(depth.runs(config), depth.runs(cut), kept, strict=True):
        for number, unit in enumerate(units):
            names |= zip(before[unit], after[number], strict=True)
    removable = {name for run in depth.runs(config) for unit in run for name in unit}
    left: dict[str, Tensor] = {}
    for key, value in weights.items():
        owner = next((name for name in _owners(key) if name in removable), None)
        if owner is None:
            left[key] = value
        elif owner in names:
            left[names[owner] + key.removeprefix(owner)] = value
    return left


def kept_blocks(config: ModelConfig, kept: Kept) -> tuple[int, ...]:
    """The numbers over all blocks of those that are kept."""
    runs = depth_of(config).runs(config)
    names = {name for run, units in zip(runs, kept, strict=True) for unit in units for name in run[unit]}
    removable = {name for run in runs for unit in run for name in unit}
    return tuple(i for i, name in enumerate(_names(config)) if name in names or name not in removable)


def _owners(key: str) -> list[str]:
    """The names of the modules that contain a tensor."""
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _names(config: ModelConfig) -> list[str]:
    """The names of all blocks of a model, in forward order."""
    model = shadow(config)
    names = {module: name for name, module in model.named_modules()}
    return [names[block] for block in model.ordered_blocks()]

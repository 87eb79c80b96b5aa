"""The choices of a depth pruning: of each group of M units in a row N are kept.

Units and runs are those of `edt_core.models.families.depth`. A group never reaches over the end of a run, so the tokens
keep their shape whichever of its units are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from edt_core.errors import UserError
from edt_core.models import FAMILIES, ModelConfig
from edt_core.models.families.depth import Depth


@dataclass(frozen=True)
class Group:
    """Units of one run, by their numbers in it, of which `keep` are kept."""

    run: int
    units: range
    keep: int

    @property
    def candidates(self) -> tuple[tuple[int, ...], ...]:
        """All choices of the units that are kept, in lexicographic order: the first keeps the first units."""
        return tuple(combinations(self.units, self.keep))


def depth_of(config: ModelConfig) -> Depth:
    """How the blocks of a model are counted. Raises UserError for a family whose blocks cannot be left out."""
    depth = FAMILIES[config.architecture].depth
    if depth is None:
        able = ", ".join(family.title for family in FAMILIES.values() if family.depth is not None)
        raise UserError(
            f"{config.name} is of {FAMILIES[config.architecture].title}, whose blocks cannot be left out; families "
            f"that can be pruned: {able}"
        )
    return depth


@lru_cache(maxsize=64)
def groups_of(config: ModelConfig, keep: tuple[int, int]) -> tuple[Group, ...]:
    """The groups of a model, run by run, that keep N of M units.

    The last group of a run may be shorter: it keeps the same share, rounded up, so that a run never loses all units.
    Raises UserError if no unit can be left out, and for a family whose blocks cannot be.
    """
    kept, size = keep
    groups = []
    runs = depth_of(config).runs(config)
    for number, run in enumerate(runs):
        for first in range(0, len(run), size):
            units = range(first, min(first + size, len(run)))
            groups.append(Group(number, units, -(-len(units) * kept // size)))
    if all(group.keep == len(group.units) for group in groups):
        lengths = ", ".join(str(len(run)) for run in runs)
        longest = max(len(run) for run in runs)
        fewer = f"Keep fewer, such as 1 of {longest}, or prune" if longest > 1 else "Prune"
        raise UserError(
            f"keeping {kept} of {size} leaves nothing out of {config.name}: its runs of blocks of one shape have "
            f"{lengths} each, and the last group of a run keeps its share rounded up. {fewer} a model with more blocks"
        )
    return tuple(groups)


def counts_of(config: ModelConfig, keep: tuple[int, int]) -> tuple[int, ...]:
    """The number of units of each run that are kept. It does not depend on which."""
    groups = groups_of(config, keep)
    runs = max(group.run for group in groups) + 1
    return tuple(sum(group.keep for group in groups if group.run == run) for run in range(runs))

"""What the training loop sees of the world: its rank, where checkpoints go, and whom to tell. No Ray in sight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from torch import Tensor

from edt_core.store.artifact import ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.training.checkpoint import Checkpoint
from edt_core.training.ranks import Ranks
from edt_core.training.store import CheckpointStore


class Request(Enum):
    """What the world wants of a training between two steps."""

    NOTHING = 0
    SAVE = 1  # a node is about to go: write a checkpoint and continue
    STOP = 2  # write a checkpoint and end


class TrainContext(Protocol):
    """One worker's view of what is outside its training. What is collective, all ranks call at the same step."""

    ranks: Ranks
    store: CheckpointStore  # rank 0 alone writes to it

    def step_done(self, step: int, total_steps: int, loss: float) -> None:
        """A step is done. Rank 0 alone calls it."""

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        """Tell the figures of the steps up to this one. Rank 0 alone calls it."""

    def warn(self, message: str) -> None:
        """Tell a person. Any rank."""

    def preview(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Show what averaged weights make. Rank 0 alone calls it."""

    def has_news(self) -> bool:
        """Whether it is time that all ranks `look`."""

    def look(self) -> Request:
        """What is wanted, the same on every rank. Collective."""


@dataclass
class LocalContext:
    """A training without a cluster; checkpoints go to `folder/checkpoints/step-NNNNNNNN`.

    `wish`, if given, is asked after each step what is wanted, and rank 0's counts.
    """

    folder: Path
    ranks: Ranks = field(default_factory=Ranks)
    num_to_keep: int = 1_000_000
    wish: Callable[[], Request] | None = None
    reported: list[dict[str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    previews: list[int] = field(default_factory=list)
    store: CheckpointStore = field(init=False)

    def __post_init__(self) -> None:
        out = ArtifactWriter(Folder.at(self.folder), "checkpoint", "0" * 64)
        self.store = CheckpointStore(out, self.num_to_keep, self.warn)

    def step_done(self, step: int, total_steps: int, loss: float) -> None: ...

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        self.reported.append({"step": float(step), **metrics})

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def preview(self, weights: Mapping[str, Tensor], step: int) -> None:
        self.previews.append(step)

    def has_news(self) -> bool:
        return self.wish is not None

    def look(self) -> Request:
        wanted = self.wish() if self.wish else Request.NOTHING
        return Request(self.ranks.agree(wanted.value))


def latest(context: TrainContext) -> Checkpoint | None:
    """The newest whole checkpoint, the same on every rank: rank 0 finds it, each checks what it reads. Collective."""
    ranks, store = context.ranks, context.store
    found = (store.newest() if ranks.rank == 0 else None) or 0
    step = ranks.agree(found)
    checkpoint = store.load(step) if step else None
    ranks.wait()  # rank 0 goes on to write others, and would prune this one under a slow reader
    return checkpoint

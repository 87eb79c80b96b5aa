"""The training loop's interface to its surroundings: its rank, its checkpoints, its reports. Independent of Ray."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from torch import Tensor

from edt_core.store.artifact import ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.training.checkpoint import Checkpoint, check_resumable, checkpoint_name
from edt_core.training.ranks import Ranks
from edt_core.training.store import CheckpointStore


class Request(Enum):
    """A request to a training between two steps."""

    NOTHING = 0
    SAVE = 1  # a node is about to shut down: write a checkpoint and continue
    STOP = 2  # write a checkpoint and end
    ENOUGH = 3  # end: the result is a checkpoint that exists


class TrainContext(Protocol):
    """One worker's interface to its surroundings. All ranks call a collective method at the same step."""

    ranks: Ranks
    store: CheckpointStore  # rank 0 alone writes to it

    def step_done(self, step: int, total_steps: int, loss: float) -> None:
        """Report that a step is complete. Only rank 0 calls it."""

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        """Report the metrics of the steps up to this one. Only rank 0 calls it."""

    def warn(self, message: str) -> None:
        """Show a warning to the user. Any rank may call it."""

    def preview(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Show samples from averaged weights. Only rank 0 calls it."""

    def has_news(self) -> bool:
        """Whether all ranks should call `look` now."""

    def look(self) -> Request:
        """The request, the same on every rank. Collective."""


@dataclass
class LocalContext:
    """A training without a cluster; checkpoints are written to `folder/checkpoints/step-NNNNNNNN`.

    `request`, if set, is called after each step for the request; rank 0's counts.
    """

    folder: Path
    ranks: Ranks = field(default_factory=Ranks)
    num_to_keep: int = 1_000_000
    request: Callable[[], Request] | None = None
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
        return self.request is not None

    def look(self) -> Request:
        request = self.request() if self.request else Request.NOTHING
        return Request(self.ranks.agree(request.value))


def latest(context: TrainContext) -> Checkpoint | None:
    """The newest valid checkpoint, the same on every rank: rank 0 finds it, each rank verifies it. Collective.

    Raises UserError on every rank if it is of an earlier version, which can be read but not resumed from.
    """
    ranks, store = context.ranks, context.store
    newest = (store.newest() if ranks.rank == 0 else None) or 0
    step = ranks.agree(newest)
    checkpoint = store.load(step) if step else None
    ranks.wait()  # otherwise rank 0 could write newer ones and prune this one while a slow rank reads it
    if checkpoint is not None:
        check_resumable(checkpoint, store.folder.child(checkpoint_name(step)).uri)
    return checkpoint

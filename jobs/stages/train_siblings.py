"""A training that goes on from a committed, shorter one of the same store (edt_core.training.start.siblings)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edt_core.config import TrainConfig
from edt_core.progress import Progress
from edt_core.store.folder import Folder

if TYPE_CHECKING:
    from edt_core.training.start.siblings import SharedCheckpoint
    from edt_core.training.store import CheckpointStore

STEP_VERSION = 2  # of the train stage


def shared(
    folder: Folder, config: TrainConfig, inputs: Mapping[str, str], images: int | None
) -> "list[SharedCheckpoint]":
    """The checkpoints that a training whose artifact belongs at `folder` can go on from, the newest first.

    Empty where the folder is not one of a store.
    """
    from edt_core.training.start.siblings import shared_checkpoints

    if folder.uri.rstrip("/").split("/")[-2:-1] != ["checkpoint"]:
        return []
    return shared_checkpoints(folder, config, inputs, STEP_VERSION, images)


def words(found: "SharedCheckpoint") -> str:
    """Where a training goes on from, as a plan says it."""
    return f"resume from {found.artifact.fingerprint[:12]} at step {found.step}"


def go_on(
    config: TrainConfig, inputs: Mapping[str, str], images: int, store: "CheckpointStore", progress: Progress
) -> None:
    """Take over the checkpoints of the shorter training that has the newest whole one; none where there is none.

    Its device time up to that step counts as this training's.
    """
    from edt_core.training.checkpoint import CheckpointError
    from edt_core.training.start.siblings import copy_checkpoint
    from jobs.stages.train_context import write_seconds

    source = None
    for found in shared(store.out.folder, config, inputs, images):
        if source is not None and found.artifact != source.artifact:
            continue
        try:
            copy_checkpoint(found, config, store.out)
        except CheckpointError as error:
            progress.warn(f"a shorter training's checkpoint cannot be used: {error}")
            continue
        source = source or found
    if source is not None:
        write_seconds(store.out, source.device_seconds)
        store.prune()

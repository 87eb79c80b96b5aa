"""Continuing a committed, shorter training of the same store (edt_core.training.start.siblings)."""

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
    """The checkpoints that a training whose artifact belongs at `folder` can continue from, the newest first.

    Empty if the folder is not in a store.
    """
    from edt_core.training.start.siblings import shared_checkpoints

    if folder.uri.rstrip("/").split("/")[-2:-1] != ["checkpoint"]:
        return []
    return shared_checkpoints(folder, config, inputs, STEP_VERSION, images)


def resume_text(checkpoint: "SharedCheckpoint") -> str:
    """The checkpoint that a training continues from, as a plan shows it."""
    return f"resume from {checkpoint.artifact.fingerprint[:12]} at step {checkpoint.step}"


def go_on(
    config: TrainConfig, inputs: Mapping[str, str], images: int, store: "CheckpointStore", progress: Progress
) -> None:
    """Take over the checkpoints of the shorter training that has the newest complete one, if there is any.

    Its device time up to that step counts as this training's.
    """
    from edt_core.training.checkpoint import CheckpointError
    from edt_core.training.start.siblings import copy_checkpoint
    from jobs.stages.train_context import write_seconds

    source = None
    for candidate in shared(store.out.folder, config, inputs, images):
        if source is not None and candidate.artifact != source.artifact:
            continue
        try:
            copy_checkpoint(candidate, config, store.out)
        except CheckpointError as error:
            progress.warn(f"a shorter training's checkpoint cannot be used: {error}")
            continue
        source = source or candidate
    if source is not None:
        write_seconds(store.out, source.device_seconds)
        store.prune()

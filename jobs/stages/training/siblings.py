"""Trainings of the same store: continuing a committed, shorter one (edt_core.training.start.siblings)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edt_core.config import TrainConfig, result_fields
from edt_core.progress import Progress
from edt_core.store.artifact import ArtifactWriter, fingerprint
from edt_core.store.folder import Folder
from edt_core.store.layout import CHECKPOINT_MANIFEST, CHECKPOINTS
from edt_core.store.store import store_of

if TYPE_CHECKING:
    from edt_core.training.start.siblings import SharedCheckpoint
    from edt_core.training.store import CheckpointStore

STEP_VERSION = 3  # of the train stage; version 2 drew the random numbers of a step at once
_DRAWN_AT_ONCE = 2


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
    from jobs.stages.training.context import write_seconds

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


def warn_of_earlier(config: TrainConfig, inputs: Mapping[str, str], out: ArtifactWriter, progress: Progress) -> None:
    """Name the checkpoints of the same training that an earlier version began and did not finish: nothing uses them."""
    store = store_of(out.folder, out.kind, out.fingerprint)
    if store is None:
        return
    earlier = fingerprint(out.kind, _DRAWN_AT_ONCE, result_fields(config), inputs)
    files = store.begun(out.kind, earlier)
    steps = sorted(name for name in files if name.startswith(f"{CHECKPOINTS}/") and name.endswith(CHECKPOINT_MANIFEST))
    if not steps:
        return
    place, name = store.folder(out.kind, earlier).uri, steps[-1].removesuffix(f"/{CHECKPOINT_MANIFEST}")
    progress.warn(
        f"this training starts from its first step: the unfinished one in {place} is of an earlier version, which drew "
        f"other random numbers, and cannot be resumed. To start from its weights, stop this run and set "
        f"train.init_from to the folder of {name} in it"
    )

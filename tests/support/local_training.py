"""Trainings as a workflow runs them, on Ray's workers or in this process; and what they leave on the disk."""

from pathlib import Path
from typing import Any

from edt_core.config import TrainConfig
from edt_core.progress import Progress, Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import CHECKPOINT_MANIFEST, CHECKPOINTS, STEP_PREFIX
from jobs.stages import train
from tests.support.local_ray import local_ray_train


def trained(
    config: TrainConfig,
    latents: Artifact,
    folder: Path,
    attempt: str = "",
    previous: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Artifact:
    """What the train verb makes of a configuration, as a step of a workflow runs it."""
    identity = train.STAGE.fingerprint(config, {"latents": latents.fingerprint})
    out = ArtifactWriter(Folder.at(folder), "checkpoint", identity, attempt, previous)
    return train.STAGE.execute(config, {"latents": latents}, out, progress or Silent())


def trained_here(config: TrainConfig, latents: Artifact, folder: Path, *attempts: Any) -> Artifact:
    """The same in this process, without Ray: workers' shares of a batch are micro-batches, one after the other."""
    with local_ray_train():
        return trained(config, latents, folder, *attempts)


def checkpoint_steps(out: Path, *, whole: bool = True) -> set[int]:
    """Steps of the checkpoints in a folder."""
    places = out.glob(f"{CHECKPOINTS}/{STEP_PREFIX}*")
    return {int(place.name[len(STEP_PREFIX) :]) for place in places if not whole or is_whole(place)}


def is_whole(place: Path) -> bool:
    return (place / CHECKPOINT_MANIFEST).exists()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

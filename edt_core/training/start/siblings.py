"""Continuing a shorter training: committed artifacts of the same store whose first steps are those of this training.

The learning rate of a constant schedule, and of wsd before its decay, does not depend on the number of steps. Two
trainings that differ in that number alone are equal up to there, bit for bit, and so are their checkpoints.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edt_core.config import TrainConfig, result_fields
from edt_core.environment import environment
from edt_core.files.small_files import UnusableFileError
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import CHECKPOINT_MANIFEST, CHECKPOINTS, STEP_PREFIX, TRAIN_STATE
from edt_core.store.store import Store
from edt_core.training.checkpoint import (
    CheckpointError,
    CheckpointManifest,
    check_checkpoint,
    checkpoint_name,
    read_manifest,
    write_manifest,
)
from edt_core.training.optim import stable_steps

# Fields in which a training may differ from one that it continues. Each acts only after the stable part.
_FREE = frozenset(("max_steps", "max_epochs", "lr_schedule", "lr_final", "decay_fraction", "decay_shape"))
_STABLE = ("constant", "wsd")
_LIBRARIES = ("machine", "torch", "numpy")  # another version gives other bits


@dataclass(frozen=True)
class SharedCheckpoint:
    """A checkpoint of a committed training that this training would write too, or pass through."""

    artifact: Artifact
    manifest: CheckpointManifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def device_seconds(self) -> float:
        """Device time up to this step: the training's, in proportion to its steps."""
        counts = self.artifact.counts
        return float(counts["device_hours"]) * 3600 * self.step / max(int(counts["steps"]), 1)


def shared_checkpoints(
    folder: Folder, config: TrainConfig, inputs: Mapping[str, str], step_version: int, images: int | None
) -> list[SharedCheckpoint]:
    """The checkpoints that a training, whose artifact will be at `folder` of a store, can continue from, newest first.

    `inputs` are the fingerprints that count, `images` is the number of latents without held-out ones, None if not known
    yet: then trainings with max_epochs have none. Files are not compared with their digests.
    """
    if not _is_exact(config) or (images is None and config.max_epochs is not None):
        return []
    shared = [
        SharedCheckpoint(artifact, manifest)
        for artifact, other in _siblings(folder, config, inputs, step_version)
        if not (other.max_epochs is not None and images is None)
        for manifest in _checkpoints(artifact)
        if _is_shared(manifest, config, other, images or 0, artifact.counts.get("holdout", {}).get("every", 1))
    ]
    return sorted(shared, key=lambda found: found.step, reverse=True)


def _is_exact(config: TrainConfig) -> bool:
    """Whether a training can be continued bit for bit: a limit on time and the order of tars depend on the machine.

    Snapshots of averages are taken at shares of all steps, so a longer training has others.
    """
    is_reproducible = config.max_hours is None and config.reader != "webdataset" and not config.ema_widths
    return config.lr_schedule in _STABLE and is_reproducible and config.max_steps > 0


def _siblings(
    folder: Folder, config: TrainConfig, inputs: Mapping[str, str], step_version: int
) -> Iterator[tuple[Artifact, TrainConfig]]:
    """The committed trainings beside an artifact that differ from it only in when and how they end."""
    *above, kind, own = folder.uri.rstrip("/").split("/")
    store, fields, here = Store(Folder.at("/".join(above))), _compared(result_fields(config)), environment()
    for artifact in store.committed(kind):
        manifest = artifact.manifest
        if artifact.fingerprint == own or manifest.step_version != step_version or manifest.inputs != inputs:
            continue
        if any(manifest.environment.get(name) != here.get(name) for name in _LIBRARIES):
            continue
        with suppress(ValueError):
            if _compared(manifest.config) == fields:
                other = TrainConfig.model_validate(manifest.config)
                if _is_exact(other) and not artifact.problems():
                    yield artifact, other


def _compared(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _FREE}


def _checkpoints(artifact: Artifact) -> Iterator[CheckpointManifest]:
    for entry in artifact.entries(f"{CHECKPOINTS}/{STEP_PREFIX}*/{CHECKPOINT_MANIFEST}"):
        with suppress(CheckpointError, UnusableFileError, OSError):
            yield read_manifest(artifact.data.read_bytes(entry.path), entry.path)


def _is_shared(
    manifest: CheckpointManifest, config: TrainConfig, other: TrainConfig, images: int, validated_every: int
) -> bool:
    """Whether the training of `config` is at this step what the other one was.

    At its end a training closes a row of the history and measures the held-out loss, and a regular checkpoint closes a
    score: only where this training does so at the same step is its history the same.
    """
    total, others_total = config.total_steps(images), other.total_steps(images)
    step = manifest.step
    if not 0 < step <= min(stable_steps(config, total), stable_steps(other, others_total)) or step >= total:
        return False
    if not manifest.regular:
        return True
    ends_alike = step % config.log_every == 0 and step % validated_every == 0
    return step % config.checkpoint_every == 0 and (step < others_total or ends_alike)


def copy_checkpoint(shared: SharedCheckpoint, config: TrainConfig, out: ArtifactWriter) -> None:
    """Put a shared checkpoint into an artifact that is being made, as this training would have written it.

    Tensors are hard-linked if possible, after comparing them with their digests. Raises CheckpointError if one differs.
    """
    name = f"{CHECKPOINTS}/{checkpoint_name(shared.step)}"
    folder = shared.artifact.directory(name)
    check_checkpoint(folder)
    state = json.loads((folder / TRAIN_STATE).read_text(encoding="utf-8"))
    text = json.dumps({**state, "config": result_fields(config)}, sort_keys=True, allow_nan=False)
    files: dict[str, str] = {}
    for file in shared.manifest.files:
        if file == TRAIN_STATE:
            files[file] = out.write_bytes(f"{name}/{file}", text.encode()).sha256
        else:
            files[file] = out.link(f"{name}/{file}", folder / file).sha256
    for file, digest in shared.manifest.files.items():
        if file != TRAIN_STATE and files[file] != digest:
            out.discard(name)
            raise CheckpointError(f"{folder / file} does not match its digest")
    manifest = CheckpointManifest(shared.step, shared.manifest.regular, shared.manifest.score, files, "")
    write_manifest(manifest, lambda file, write_to: out.write(f"{name}/{file}", write_to))

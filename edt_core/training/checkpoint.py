"""Training checkpoints: safetensors and JSON in one folder, with digests in a manifest that is written last.

Loading never unpickles, and never takes a folder whose manifest is missing or disagrees with a file.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edt_core.models import EDT, ModelConfig
from edt_core.schema import (
    CHECKPOINT_MANIFEST,
    CHECKPOINT_VERSION,
    EMA_WEIGHTS,
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    OPTIMIZER_STATE,
    STEP_PREFIX,
    TIMESTEP_STATE,
    TRAIN_STATE,
)
from edt_core.storage import fsync_file, sha256_file


class CheckpointError(RuntimeError):
    """A checkpoint is not whole."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything a training needs to go on: `step` steps are done."""

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    optimizer_groups: list[dict[str, Any]]
    timesteps: dict[str, Tensor]
    model_config: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)
    pending: list[dict[str, float]] = field(default_factory=list)


def checkpoint_name(step: int) -> str:
    return f"{STEP_PREFIX}{step:08d}"


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into an empty folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        MODEL_WEIGHTS: checkpoint.model,
        EMA_WEIGHTS: checkpoint.ema,
        OPTIMIZER_STATE: checkpoint.optimizer,
        TIMESTEP_STATE: checkpoint.timesteps,
    }
    for name, values in tensors.items():
        save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, folder / name)
    state = {
        "step": checkpoint.step,
        "optimizer_groups": checkpoint.optimizer_groups,
        "history": checkpoint.history,
        "pending": checkpoint.pending,
    }
    (folder / TRAIN_STATE).write_text(json.dumps(state, sort_keys=True))
    (folder / MODEL_CONFIG).write_text(json.dumps(checkpoint.model_config, indent=1, sort_keys=True))
    names = [*tensors, TRAIN_STATE, MODEL_CONFIG]
    for name in names:
        fsync_file(folder / name)
    manifest = {
        "version": CHECKPOINT_VERSION,
        "step": checkpoint.step,
        "files": {name: sha256_file(folder / name) for name in names},
    }
    staged = folder / f".{CHECKPOINT_MANIFEST}"
    staged.write_text(json.dumps(manifest, indent=1, sort_keys=True))
    fsync_file(staged)
    staged.replace(folder / CHECKPOINT_MANIFEST)
    fsync_file(folder / CHECKPOINT_MANIFEST)


def check_checkpoint(folder: Path) -> int:
    """Verify a checkpoint's digests and return its step. Raises CheckpointError with the reason."""
    try:
        manifest = json.loads((folder / CHECKPOINT_MANIFEST).read_bytes())
        version, step, files = manifest["version"], int(manifest["step"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} has no whole {CHECKPOINT_MANIFEST} ({error})") from error
    if version != CHECKPOINT_VERSION:
        raise CheckpointError(f"{folder} has checkpoint version {version}, this code reads {CHECKPOINT_VERSION}")
    for name, digest in files.items():
        path = folder / Path(name).name
        if not path.exists() or sha256_file(path) != digest:
            raise CheckpointError(f"{folder}/{name} is missing or differs from its digest")
    return step


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after verifying it. Raises CheckpointError."""
    step = check_checkpoint(folder)
    state = json.loads((folder / TRAIN_STATE).read_bytes())
    return Checkpoint(
        step=step,
        model=load_file(folder / MODEL_WEIGHTS),
        ema=load_file(folder / EMA_WEIGHTS),
        optimizer=load_file(folder / OPTIMIZER_STATE),
        optimizer_groups=state["optimizer_groups"],
        timesteps=load_file(folder / TIMESTEP_STATE),
        model_config=json.loads((folder / MODEL_CONFIG).read_bytes()),
        history=state["history"],
        pending=state["pending"],
    )


def newest_checkpoint(folders: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """The whole checkpoint of the highest step, and a reason for each newer one that was passed over."""
    passed_over: list[str] = []
    for folder in sorted(folders, key=lambda path: path.name, reverse=True):
        try:
            check_checkpoint(folder)
            return folder, passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    return None, passed_over


def ema_model(folder: Path, device: torch.device | str = "cpu") -> EDT:
    """The EDT of a folder with `model_config.json` and `ema.safetensors`, in evaluation mode."""
    model = EDT(ModelConfig.from_dict(json.loads((folder / MODEL_CONFIG).read_bytes())))
    model.load_state_dict(load_file(folder / EMA_WEIGHTS), strict=True)
    return model.to(device).eval()

"""One training checkpoint: a folder of safetensors and JSON, with digests in a manifest that is written last.

Loading never unpickles, and rejects a folder whose manifest is missing or does not match a file.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edt_core.errors import UserError
from edt_core.files.host_copies import PinnedRing
from edt_core.files.small_files import UnusableFileError, parse_json, read_bounded, read_json
from edt_core.files.tensor_files import load_state, load_tensors
from edt_core.models import DiffusionTransformer, ModelConfig, build_model
from edt_core.store.folder import sha256_file
from edt_core.store.layout import (
    CHECKPOINT_MANIFEST,
    CHECKPOINT_VERSION,
    EMA_WEIGHTS,
    MODEL_CONFIG,
    READABLE_CHECKPOINTS,
    STEP_PREFIX,
    TRAIN_STATE,
)
from edt_core.store.manifest import FileEntry, sha256_json
from edt_core.training.shard.files import Save, save_alone

WriteFile = Callable[[str, Callable[[Path], int | None]], FileEntry]  # as `ArtifactWriter.write`


class CheckpointError(RuntimeError):
    """A checkpoint is incomplete, damaged, or of another version."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything a training needs to resume after `step` completed steps.

    `tensors` are named tensors by file name, `state` is plain JSON. `score` is the held-out loss, or without held-out
    images the mean loss since the previous checkpoint. A checkpoint is `regular` if an uninterrupted training writes it
    too. `version` is that of its format.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    model_config: Mapping[str, Any]
    score: float | None
    regular: bool = True
    version: int = CHECKPOINT_VERSION


@dataclass(frozen=True)
class CheckpointManifest:
    """The content of a checkpoint's manifest. `files`: sha256 by name; `seal`: sha256 of the other fields."""

    step: int
    regular: bool
    score: float | None
    files: Mapping[str, str]
    seal: str
    version: int = CHECKPOINT_VERSION


def checkpoint_name(step: int) -> str:
    """The folder name of a step's checkpoint; names sort by step."""
    return f"{STEP_PREFIX}{step:08d}"


def write_checkpoint(checkpoint: Checkpoint, write: WriteFile, save: Save = save_alone) -> CheckpointManifest:
    """Write the files of a checkpoint whose tensors are in host memory, the manifest last.

    With `JointFiles.save` other ranks call `write_tensors` at the same time.
    """
    files: dict[str, str] = {}
    for name, tensors in checkpoint.tensors.items():
        files[name] = write(name, _tensor_writer(tensors, save)).sha256
    texts = {
        TRAIN_STATE: json.dumps(checkpoint.state, sort_keys=True, allow_nan=False),
        MODEL_CONFIG: json.dumps(checkpoint.model_config, indent=1, sort_keys=True),
    }
    for name, text in texts.items():
        files[name] = write(name, _text_writer(text)).sha256
    return write_manifest(CheckpointManifest(checkpoint.step, checkpoint.regular, checkpoint.score, files, ""), write)


def write_tensors(checkpoint: Checkpoint, save: Save) -> None:
    """Write this rank's tensors into the files that rank 0 makes."""
    for tensors in checkpoint.tensors.values():
        save(tensors, None, None)


def write_manifest(manifest: CheckpointManifest, write: WriteFile) -> CheckpointManifest:
    """Write the manifest of a checkpoint whose files are written, and return it with its seal."""
    fields = {
        "version": manifest.version,
        "step": manifest.step,
        "regular": manifest.regular,
        "score": manifest.score,
        "files": dict(manifest.files),
    }
    seal = sha256_json(fields)
    write(CHECKPOINT_MANIFEST, _text_writer(json.dumps({**fields, "seal": seal}, indent=1, sort_keys=True)))
    return replace(manifest, seal=seal)


def _tensor_writer(tensors: Mapping[str, Tensor], save: Save) -> Callable[[Path], None]:
    def write_to(path: Path) -> None:
        save(tensors, path, None)

    return write_to


def _text_writer(text: str) -> Callable[[Path], None]:
    def write_to(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write_to


def read_manifest(data: bytes, where: str) -> CheckpointManifest:
    """A checkpoint's manifest from its bytes. Raises CheckpointError if it is invalid or of another version."""
    try:
        fields = parse_json(data, f"{where}/{CHECKPOINT_MANIFEST}")
        seal = fields.pop("seal")
        if seal != sha256_json(fields):
            raise CheckpointError(f"{where}: {CHECKPOINT_MANIFEST} was changed: it does not match its seal")
        if fields["version"] not in READABLE_CHECKPOINTS:
            readable = " and ".join(map(str, READABLE_CHECKPOINTS))
            raise CheckpointError(f"{where} has checkpoint version {fields['version']}; this code reads {readable}")
        return CheckpointManifest(**fields, seal=seal)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: {CHECKPOINT_MANIFEST} is invalid ({error})") from error


def check_checkpoint(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint whose files all match their digests. Raises CheckpointError with the reason."""
    try:
        manifest = read_manifest(read_bounded(folder / CHECKPOINT_MANIFEST), str(folder))
    except UnusableFileError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{folder} has no {CHECKPOINT_MANIFEST}: it is incomplete ({error})") from error
    for name, digest in manifest.files.items():
        path = folder / Path(name).name
        if not path.exists():
            raise CheckpointError(f"{folder}/{name} is missing")
        if sha256_file(path) != digest:
            raise CheckpointError(f"{folder}/{name} does not match its digest")
    return manifest


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after verifying it. Raises CheckpointError."""
    manifest = check_checkpoint(folder)
    return Checkpoint(
        step=manifest.step,
        tensors={name: load_tensors(folder / name) for name in manifest.files if name.endswith(".safetensors")},
        state=read_json(folder / TRAIN_STATE),
        model_config=read_json(folder / MODEL_CONFIG),
        score=manifest.score,
        regular=manifest.regular,
        version=manifest.version,
    )


def check_resumable(checkpoint: Checkpoint, place: str) -> None:
    """Raise UserError for a checkpoint of an earlier version, whose training drew other random numbers."""
    if checkpoint.version != CHECKPOINT_VERSION:
        raise UserError(
            f"{place} has checkpoint version {checkpoint.version}: its training drew other random numbers than "
            f"this code would (checkpoint version {CHECKPOINT_VERSION}), so it cannot be resumed. Give another output "
            f"folder and start from its weights with train.init_from={place}, or resume with the version of edt that "
            "wrote it"
        )


def _text(fields: dict[str, Any], name: str) -> str:
    return repr(fields[name]) if name in fields else "at its default"


def require_same(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise UserError unless the fields of a checkpoint's training are those of this one."""
    # A field at its default may be left out on either side, so the fields of both are compared.
    different = [
        f"{name} {_text(saved, name)} instead of {_text(current, name)}"
        for name in dict.fromkeys([*current, *saved])
        if name not in saved or name not in current or saved[name] != current[name]
    ]
    if different:
        raise UserError(
            f"the checkpoint is of a training with {', '.join(different)}; resume with the checkpoint's configuration, "
            "or start a new training"
        )


class HostMemory:
    """Copies of a checkpoint's tensors in host memory, which the next checkpoint reuses.

    Tensors on a GPU are copied through a small ring of page-locked memory; the copies themselves are not page-locked.
    Copies are valid until the next call of `copy`.
    """

    def __init__(self, ring: PinnedRing | None = None) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._ring = PinnedRing() if ring is None else ring

    def copy(self, checkpoint: Checkpoint) -> Checkpoint:
        """A copy of the checkpoint that later training steps do not change."""
        copies = {
            file: {name: self._copy_tensor((file, name), value) for name, value in tensors.items()}
            for file, tensors in checkpoint.tensors.items()
        }
        self._ring.finish()
        return replace(checkpoint, tensors=copies)

    def _copy_tensor(self, key: tuple[str, str], value: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype)
            self._buffers[key] = buffer
        if value.is_cuda:
            self._ring.copy(buffer, value)
        else:
            buffer.copy_(value.detach())
        return buffer


def check_whole(folder: Path) -> None:
    """Raise UserError for a checkpoint that holds only the tensors of a fine-tuning (train.trainable)."""
    state = folder / TRAIN_STATE
    if state.exists() and "base" in read_json(state):
        raise UserError(
            f"{folder} holds only the trained tensors of a fine-tuning, without its base model; give the checkpoint "
            "artifact instead, which holds the merged model, or the registered version"
        )


def ema_model(folder: Path, device: torch.device | str = "cpu") -> DiffusionTransformer:
    """The model of a folder with `model_config.json` and `ema.safetensors`, in evaluation mode.

    Raises UserError for a checkpoint that holds only the tensors of a fine-tuning.
    """
    check_whole(folder)
    model = build_model(ModelConfig.from_dict(read_json(folder / MODEL_CONFIG)))
    load_state(model, folder / EMA_WEIGHTS)
    return model.to(device).eval()

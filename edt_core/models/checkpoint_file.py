"""Checkpoint files from elsewhere: what is in them, read without executing anything, and the sets of weights they hold.

A file is a `torch.save` (any name: .pt, .pth, .bin, .ckpt) or a safetensors file. PyTorch's reader of plain weights is
allowed `argparse.Namespace`, which holds a training's options, and no other class. A set of weights is known by the
keys that all models of a family share, wherever it lies: at the top, under `ema` and `model` as the authors save it,
under `state_dict` with a prefix as Lightning saves it, or in the nested dict that `dcp_to_torch_save` writes.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from edt_core.errors import UserError
from edt_core.files.tensor_files import opened_tensors
from edt_core.models.families import FAMILIES

WeightsName = Literal["ema", "model"]

METADATA = "metadata"  # where the text in a safetensors header is put
# One of these keys marks a set of weights; what precedes it is the set's prefix.
_ANCHORS = tuple(dict.fromkeys(mark for family in FAMILIES.values() for mark in family.released.marks))
_WRAPPERS = frozenset(  # key parts added by torch.compile, data-parallel training, FSDP, activation checkpointing
    ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)
_COUNTER = "n_averaged"  # torch.optim.swa_utils.AveragedModel counts its updates in it
_OPTIMIZER = frozenset(("opt", "optim", "optimizer", "optimizers", "optimizer_states", "callbacks", "loops", "scaler"))
_REFUSED = ("unsupported global", "unsupported class", "call reduce")  # PyTorch's reader's words for code
_MAX_EXPANDED = 100_000_000  # values of a weight that the file holds fewer of
_MAX_DEPTH, _MAX_TENSORS = 8, 1_000_000
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class WeightSet:
    """One state dict in a file, its keys without prefix and wrappers. `label` is the prefix, empty at the top level."""

    label: str
    is_average: bool
    tensors: dict[str, Tensor]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file. Raises UserError where there is none, or where reading it would run code."""
    if path.is_dir() and (path / ".metadata").exists():
        raise UserError(
            f"{path} is a folder of torch.distributed.checkpoint. Convert it with `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE.pt`, and give FILE.pt."
        )
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the checkpoint (.pt) that the authors released")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    if not isinstance(content, dict) or not content:
        raise not_a_checkpoint(path, f"it holds a {type(content).__name__} without weights")
    return content


def not_a_checkpoint(path: Path, reason: str) -> UserError:
    """The error of a file that holds no weights that can be read."""
    return UserError(f"{path} is not a checkpoint of the authors' code, or not whole: {reason}; fetch it again")


def weight_sets(path: Path, content: Mapping[str, Any]) -> list[WeightSet]:
    """All sets of weights in a file. Without any key of a known model, all its tensors are one set.

    Raises UserError: no tensors, or two tensors with the same key once the wrappers are removed.
    """
    tensors: dict[str, Tensor] = {}
    for key, tensor in islice(_flat(content), _MAX_TENSORS):
        plain = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if plain in tensors:
            raise UserError(
                f"{path} holds {plain!r} twice: with and without a wrapper such as 'module.' or '_orig_mod.'. Save one "
                "state dict alone and import that file."
            )
        tensors[plain] = tensor
    if not tensors:
        raise not_a_checkpoint(path, "it holds no tensors")
    prefixes = sorted({key.removesuffix(anchor) for key in tensors for anchor in _ANCHORS if _ends_with(key, anchor)})
    return [_weight_set(tensors, prefix, prefixes) for prefix in prefixes or [_common_prefix(content)]]


def choose_weights(path: Path, sets: Sequence[WeightSet], weights: WeightsName | None) -> WeightSet:
    """The set asked for; None prefers an average. A file that is one bare state dict has one set for either name.

    Raises UserError: no such set, or several.
    """
    if len(sets) == 1 and not sets[0].label:
        return sets[0]
    averages, trained = [s for s in sets if s.is_average], [s for s in sets if not s.is_average]
    chosen = (averages or trained) if weights is None else {"ema": averages, "model": trained}[weights]
    if not chosen:
        other = "model" if weights == "ema" else "ema"
        raise UserError(
            f"{path} has no {weights!r} weights, only {_labels(sets)}; ask for weights {other!r} (--weights {other})"
        )
    if len(chosen) > 1:
        raise UserError(
            f"{path} holds {len(chosen)} sets of weights to choose from ({_labels(chosen)}). Save the one you mean "
            "alone as a state dict and import that file."
        )
    return chosen[0]


def check_dtypes(path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise UserError for weights that are not plain floating-point numbers, such as quantised ones."""
    wrong = [
        f"{key!r} is {_kind(value)}"
        for key, value in state.items()
        if value.layout != torch.strided
        or value.is_quantized
        or value.is_meta  # a shape without values
        or (expected[key].is_floating_point() and value.dtype not in _FLOATS)
    ]
    if wrong:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        raise UserError(
            f"{path}: {wrong[0]}{_and_more(len(wrong))}. Weights must be dense and of dtype {known}; give the "
            "checkpoint from before it was quantised or converted."
        )


def check_storage(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise UserError for weights that repeat fewer values than they have: a small file could ask for any memory."""
    for key, value in state.items():
        if value.layout == torch.strided and value.device.type != "meta":
            stored = value.untyped_storage().nbytes() // value.element_size()
            if value.numel() > max(stored, _MAX_EXPANDED):
                raise UserError(
                    f"{path}: {key!r} has {value.numel():,} values, and the file holds {stored:,} of them: it was "
                    "expanded. Save contiguous tensors (.contiguous()), and import that file."
                )


def check_finite(path: Path, loaded: Mapping[str, Tensor]) -> None:
    """Raise UserError where float32 weights are NaN or infinite."""
    bad = {key: value for key, value in loaded.items() if value.is_floating_point() and not _all_finite(value)}
    if bad:
        key, value = next(iter(bad.items()))
        count = int(value.numel() - value.isfinite().sum())
        raise UserError(
            f"{path}: {count:,} of the {value.numel():,} values of {key!r} are not finite float32 numbers (NaN or "
            f"infinite){_and_more(len(bad))}. The model cannot be sampled; give a checkpoint from before its training "
            "diverged, or the file's other weights (--weights ema, --weights model)."
        )


def other_tensors(content: Mapping[str, Any], sets: Sequence[WeightSet]) -> list[str]:
    """Names of the parts of a file with tensors that belong to no set of weights and to no optimizer."""
    labels = [s.label for s in sets]
    if "" in labels:
        return []
    names: dict[str, None] = {}
    for key, _ in islice(_flat(content), _MAX_TENSORS):
        parts = [part for part in key.split(".") if part not in _WRAPPERS]
        inside = any(".".join(parts).startswith(f"{label}.") for label in labels)
        if not inside and not _OPTIMIZER.intersection(parts):
            names[".".join(parts[: 2 if parts[0] == "state_dict" else 1])] = None
    return list(names)


def _read_pickle(path: Path) -> Any:
    if path.suffix == ".safetensors":  # PyTorch's reader goes by the name
        raise not_a_checkpoint(path, "its name ends in .safetensors, but it is no safetensors file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped where the format allows it: the optimizer's state, most of the file, is never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if line := _line_with(error, _REFUSED):
            raise UserError(
                f"{path} asks for code to be run when it is read ({line}), which weights do not need; nothing was run. "
                "Get the file from its authors, or have its state dict alone saved."
            ) from error
        reason = _known_content(path) or _line_with(error, ("unsupported",)) or "it is no pickle"
        raise not_a_checkpoint(path, reason) from error
    except Exception as error:  # a reader of arbitrary bytes fails in arbitrary ways
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript program; give the checkpoint with its state dict") from error
        raise not_a_checkpoint(path, _known_content(path) or type(error).__name__) from error


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins with the length of a JSON header that fits into it."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with opened_tensors(path) as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
    except Exception as error:  # as above
        raise not_a_checkpoint(path, f"as a safetensors file it is damaged or cut short ({error})") from error
    return {**tensors, METADATA: metadata} if metadata and tensors else tensors


def _known_content(path: Path) -> str:
    """What a file is that is often saved in place of a checkpoint."""
    with path.open("rb") as file:
        head = file.read(200).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, whose content `git lfs pull` fetches"
    return ""


def _line_with(error: Exception, words: tuple[str, ...]) -> str:
    """The line of a message of PyTorch's reader with one of the words; its other lines advise to read unsafely."""
    lines = (line.strip().partition(" Please use ")[0] for line in str(error).splitlines())
    return next((line[:200].rstrip(".") for line in lines if any(word in line.lower() for word in words)), "")


def _flat(content: Mapping[Any, Any], prefix: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dicts, by their dotted keys. A dict inside itself is not followed."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and id(value) not in above and len(above) < _MAX_DEPTH:
            yield from _flat(value, f"{prefix}{key}.", (*above, id(content)))


def _ends_with(key: str, anchor: str) -> bool:
    return key == anchor or key.endswith(f".{anchor}")


def _common_prefix(content: Mapping[str, Any]) -> str:
    """Where the weights lie in a file without a key of a known model: the names that the authors use, or the top."""
    return next((f"{name}." for name in ("ema", "model", "state_dict") if isinstance(content.get(name), Mapping)), "")


def _weight_set(tensors: Mapping[str, Tensor], prefix: str, prefixes: Sequence[str]) -> WeightSet:
    inner = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    own = {
        key.removeprefix(prefix): value
        for key, value in tensors.items()
        if key.startswith(prefix) and not (inner and key.startswith(inner))
    }
    counter = own.pop(_COUNTER, None)
    return WeightSet(prefix.rstrip("."), counter is not None or _names_average(prefix), own)


def _names_average(prefix: str) -> bool:
    words = re.split(r"[^a-z0-9]+", prefix.lower())
    return any(word.startswith("ema") or word in ("averaged", "swa", "shadow") for word in words)


def _labels(sets: Sequence[WeightSet]) -> str:
    return ", ".join(repr(s.label) for s in sets) or "none"


def _kind(value: Tensor) -> str:
    if value.is_meta:
        return "a shape without values (device meta)"
    return str(value.dtype if value.layout == torch.strided else value.layout)


def _all_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _and_more(count: int) -> str:
    return f", and {count - 1} more tensors too" if count > 1 else ""

"""Read checkpoint files of other code without executing anything, and find the sets of weights in them.

A file is written by `torch.save` (any name: .pt, .pth, .bin, .ckpt) or is a safetensors file. PyTorch's reader of plain
weights may load `argparse.Namespace`, which contains a training's options, and no other class. A set of weights is
recognised by the keys that all models of a family share, anywhere in the file: at the top, under `ema` and `model` as
the authors save it, under `state_dict` with a prefix as Lightning saves it, or in the nested dict that
`dcp_to_torch_save` writes.
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

METADATA = "metadata"  # the key for the text of a safetensors header
# A key that ends with one of these marks a set of weights; the part before it is the set's prefix.
_ANCHORS = tuple(dict.fromkeys(mark for family in FAMILIES.values() for mark in family.released.marks))
_WRAPPERS = frozenset(  # key parts added by torch.compile, data-parallel training, FSDP, activation checkpointing
    ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)
_COUNTER = "n_averaged"  # the number of updates of a torch.optim.swa_utils.AveragedModel
_OPTIMIZER = frozenset(("opt", "optim", "optimizer", "optimizers", "optimizer_states", "callbacks", "loops", "scaler"))
_REFUSED = ("unsupported global", "unsupported class", "call reduce")  # in messages of PyTorch's reader about code
_MAX_EXPANDED = 100_000_000  # values of a weight that stores fewer values in the file
_MAX_DEPTH, _MAX_TENSORS = 8, 1_000_000
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class WeightSet:
    """One state dict in a file, keys without prefix and wrappers. `label` is the prefix, empty at the top level."""

    label: str
    is_average: bool
    tensors: dict[str, Tensor]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file. Raises UserError if it is missing, invalid, or needs code to be run."""
    if path.is_dir() and (path / ".metadata").exists():
        raise UserError(
            f"{path} is a folder of torch.distributed.checkpoint. Convert it with `python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE.pt`, and use FILE.pt."
        )
    if not path.is_file():
        raise UserError(f"{path} is not a file; specify the checkpoint file (.pt) that the authors released")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    if not isinstance(content, dict) or not content:
        raise not_a_checkpoint(path, f"it contains a {type(content).__name__} without weights")
    return content


def not_a_checkpoint(path: Path, reason: str) -> UserError:
    """The error for a file without readable weights."""
    return UserError(f"{path} is not a checkpoint of the authors' code, or is damaged: {reason}; download it again")


def weight_sets(path: Path, content: Mapping[str, Any]) -> list[WeightSet]:
    """All sets of weights in a file. If no key belongs to a known model, all tensors are one set.

    Raises UserError for no tensors, and for two tensors with the same key after the wrappers are removed.
    """
    tensors: dict[str, Tensor] = {}
    for key, tensor in islice(_flat(content), _MAX_TENSORS):
        plain = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if plain in tensors:
            raise UserError(
                f"{path} contains {plain!r} twice: with and without a wrapper such as 'module.' or '_orig_mod.'. Save "
                "only one state dict and import that file."
            )
        tensors[plain] = tensor
    if not tensors:
        raise not_a_checkpoint(path, "it contains no tensors")
    prefixes = sorted({key.removesuffix(anchor) for key in tensors for anchor in _ANCHORS if _ends_with(key, anchor)})
    return [_weight_set(tensors, prefix, prefixes) for prefix in prefixes or [_common_prefix(content)]]


def choose_weights(path: Path, sets: Sequence[WeightSet], weights: WeightsName | None) -> WeightSet:
    """The requested set; None prefers an average. The set of a bare state dict matches either name.

    Raises UserError if there is no such set, or several.
    """
    if len(sets) == 1 and not sets[0].label:
        return sets[0]
    averages, trained = [s for s in sets if s.is_average], [s for s in sets if not s.is_average]
    chosen = (averages or trained) if weights is None else {"ema": averages, "model": trained}[weights]
    if not chosen:
        other = "model" if weights == "ema" else "ema"
        raise UserError(
            f"{path} has no {weights!r} weights, only {_labels(sets)}; use weights {other!r} (--weights {other})"
        )
    if len(chosen) > 1:
        raise UserError(
            f"{path} contains {len(chosen)} matching sets of weights ({_labels(chosen)}). Save only the one you mean "
            "as a state dict and import that file."
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
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        raise UserError(
            f"{path}: {wrong[0]}{_and_more(len(wrong))}. Weights must be dense and of dtype {dtypes}; use the "
            "checkpoint from before quantisation or conversion."
        )


def check_storage(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise UserError for huge weights that repeat a few stored values: a small file could allocate any memory."""
    for key, value in state.items():
        if value.layout == torch.strided and value.device.type != "meta":
            stored = value.untyped_storage().nbytes() // value.element_size()
            if value.numel() > max(stored, _MAX_EXPANDED):
                raise UserError(
                    f"{path}: {key!r} has {value.numel():,} values, but the file stores only {stored:,} of them: it is "
                    "an expanded tensor. Save contiguous tensors (.contiguous()), and import that file."
                )


def check_finite(path: Path, loaded: Mapping[str, Tensor]) -> None:
    """Raise UserError for weights that are NaN or infinite in float32."""
    bad = {key: value for key, value in loaded.items() if value.is_floating_point() and not _all_finite(value)}
    if bad:
        key, value = next(iter(bad.items()))
        count = int(value.numel() - value.isfinite().sum())
        raise UserError(
            f"{path}: {count:,} of the {value.numel():,} values of {key!r} are not finite float32 numbers (NaN or "
            f"infinite){_and_more(len(bad))}. The model cannot be sampled; use a checkpoint from before its training "
            "diverged, or the file's other weights (--weights ema, --weights model)."
        )


def other_tensors(content: Mapping[str, Any], sets: Sequence[WeightSet]) -> list[str]:
    """Names of the parts of a file whose tensors belong to no set of weights and to no optimizer."""
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
    if path.suffix == ".safetensors":  # PyTorch's reader chooses the format by the name
        raise not_a_checkpoint(path, "its name ends in .safetensors, but it is not a safetensors file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Memory-mapped if the format allows it: the optimizer's state, most of the file, is never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if line := _line_with(error, _REFUSED):
            raise UserError(
                f"{path} needs code to be run when it is loaded ({line}), which weights do not need; nothing was run. "
                "Get the file from its authors, or ask them for a file with only its state dict."
            ) from error
        reason = _known_content(path) or _line_with(error, ("unsupported",)) or "it is not a pickle"
        raise not_a_checkpoint(path, reason) from error
    except Exception as error:  # a reader of arbitrary bytes fails in arbitrary ways
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript program; use the checkpoint with its state dict") from error
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
        raise not_a_checkpoint(path, f"it is a damaged or truncated safetensors file ({error})") from error
    return {**tensors, METADATA: metadata} if metadata and tensors else tensors


def _known_content(path: Path) -> str:
    """A description of a file that is often saved in place of a checkpoint; "" for other content."""
    with path.open("rb") as file:
        head = file.read(200).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch its content with `git lfs pull`"
    return ""


def _line_with(error: Exception, words: tuple[str, ...]) -> str:
    """The line with one of the words in a message of PyTorch's reader, whose other lines advise unsafe loading."""
    lines = (line.strip().partition(" Please use ")[0] for line in str(error).splitlines())
    return next((line[:200].rstrip(".") for line in lines if any(word in line.lower() for word in words)), "")


def _flat(content: Mapping[Any, Any], prefix: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dicts with their dotted keys. A dict that contains itself is visited once."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and id(value) not in above and len(above) < _MAX_DEPTH:
            yield from _flat(value, f"{prefix}{key}.", (*above, id(content)))


def _ends_with(key: str, anchor: str) -> bool:
    return key == anchor or key.endswith(f".{anchor}")


def _common_prefix(content: Mapping[str, Any]) -> str:
    """The prefix of the weights in a file without a key of a known model: a name that the authors use, or ""."""
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
    return f", and {count - 1} more tensors" if count > 1 else ""

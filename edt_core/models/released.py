"""Read checkpoints that the authors of EDT, DiT and MDTv2 released: which model they hold, and its weights.

A file is a `torch.save` of a dict with `model`, `ema`, `opt` and `args`, or of a bare state dict, as those of DiT and
MDTv2 are. Which of the named models it is follows from keys and shapes alone. Nothing in a file is executed: PyTorch's
reader of plain weights is allowed `argparse.Namespace`, which holds the training's options, and no other class.
"""

from __future__ import annotations

import argparse
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from edt_core.errors import UserError
from edt_core.models.base import DiffusionTransformer
from edt_core.models.config import MDTv2Config, ModelConfig
from edt_core.models.zoo import MODEL_NAMES, build_model, model_config

WeightsName = Literal["ema", "model"]

_WRAPPER = "module."  # what data-parallel training puts before each key
_REFUSED = ("unsupported global", "unsupported class", "call reduce")  # what PyTorch's reader says of code
_POSITIONS, _LABELS, _PATCHES = "pos_embed", "y_embedder.embedding_table.weight", "x_embedder.proj.weight"
_DECODER = "de_blocks."  # of MDTv2
_PAIRS = ".relative_position_index"  # of MDTv2: integers that follow from the grid


def load_released(path: Path | str, weights: WeightsName = "ema") -> DiffusionTransformer:
    """The model of a checkpoint file, in evaluation mode on the CPU, its weights float32.

    `weights`: the averaged ones that the paper samples with, or those being trained; a bare state dict has one set.
    Raises UserError: no checkpoint, code in it, other weights than asked for, or keys and shapes of no known model.
    """
    path = Path(path)
    content = _read(path)
    state = _state_dict(path, content, weights)
    config = _identify(path, state)
    _check_null_class(path, config, content.get("args"))
    model = build_model(config)
    _check_pairs(path, model, state)
    model.load_state_dict(state)
    return model.eval()


def _read(path: Path) -> dict[str, Any]:
    """What a checkpoint file holds, without executing anything."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the checkpoint (.pt) that the authors released")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped where the format allows it: the optimizer's state, most of the file, is never read.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if line := _line_with(error, _REFUSED):
            raise UserError(
                f"{path} asks for code to be run when it is read ({line}), which weights do not need; nothing was run. "
                "Get the file from its authors, or have its state dict alone saved."
            ) from error
        raise _not_a_checkpoint(path, _line_with(error, ("unsupported",)) or "it is no pickle") from error
    except Exception as error:  # a reader of arbitrary bytes fails in arbitrary ways
        raise _not_a_checkpoint(path, type(error).__name__) from error
    if not isinstance(content, dict) or not content:
        raise _not_a_checkpoint(path, f"it holds a {type(content).__name__} without weights")
    return content


def _not_a_checkpoint(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not a checkpoint of the authors' code, or not whole: {reason}; fetch it again")


def _line_with(error: Exception, words: tuple[str, ...]) -> str:
    """The line of a message of PyTorch's reader with one of the words; its other lines advise to read unsafely."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line[:200].rstrip(".") for line in lines if any(word in line.lower() for word in words)), "")


def _state_dict(path: Path, content: dict[str, Any], weights: WeightsName) -> dict[str, Tensor]:
    """The state dict asked for, with the keys of EDT."""
    sets = [name for name in ("ema", "model") if isinstance(content.get(name), Mapping)]
    if sets and weights not in sets:
        raise UserError(f"{path} has no {weights!r} weights, only {sets[0]!r}; ask for weights {sets[0]!r}")
    state = content[weights] if sets else content
    wrong = [str(key) for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if wrong or not state:
        raise _not_a_checkpoint(path, f"{len(wrong)} of its {len(state)} entries are no tensors, as {wrong[:3]}")
    if all(key.startswith(_WRAPPER) for key in state):
        return {key.removeprefix(_WRAPPER): value for key, value in state.items()}
    return dict(state)


@dataclass(frozen=True)
class _Fit:
    """How a state dict differs from that of a model: a line for each key, in the model's order."""

    config: ModelConfig
    differences: tuple[str, ...]


def _identify(path: Path, state: Mapping[str, Tensor]) -> ModelConfig:
    """The configuration whose state dict has just these keys and shapes. Raises UserError naming the closest one."""
    best: _Fit | None = None
    for name in MODEL_NAMES:
        fit = _fit(name, state)
        if not fit.differences:
            return fit.config
        if best is None or len(fit.differences) < len(best.differences):
            best = fit
    assert best is not None
    config, more = best.config, len(best.differences) - 1
    raise UserError(
        f"{path} fits no known model ({', '.join(MODEL_NAMES)}). The closest is {config.name} at {config.image_size} "
        f"pixels with {config.num_classes} classes, but {best.differences[0]}"
        + (f", and {more} more keys differ" if more else "")
        + ". Give a checkpoint of one of these models, or train one here."
    )


def _fit(name: str, state: Mapping[str, Tensor]) -> _Fit:
    """The model of this name with the state dict's own resolution, classes and channels, and where it differs."""
    config = _config_like(name, state)
    expected = _shapes(config)
    found = {key: tuple(value.shape) for key, value in state.items()}
    differences = [
        f"{key!r} is missing" if key not in found else f"{key!r} has shape {list(found[key])}, not {list(shape)}"
        for key, shape in expected.items()
        if found.get(key) != shape
    ]
    differences += [f"{key!r} is not a key of it" for key in found if key not in expected]
    return _Fit(config, tuple(differences))


@lru_cache(maxsize=64)
def _shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The keys and shapes of a model's state dict, in its order."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build_model(config).state_dict().items()}


def _config_like(name: str, state: Mapping[str, Tensor]) -> ModelConfig:
    """A named model with what the shapes say; what they do not say, or what makes no model, is as published."""
    published = model_config(name)
    positions, labels, patches = (_shape(state, key) for key in (_POSITIONS, _LABELS, _PATCHES))
    grid = math.isqrt(positions[1]) if len(positions) == 3 else 0
    num_classes = labels[0] - 1 if labels and labels[0] > 1 else published.num_classes  # the last row is the null class
    channels = patches[1] if len(patches) == 4 and patches[1] else published.in_channels
    try:
        image_size = grid * published.patch_size * published.autoencoder_factor
        return _with_decoder(model_config(name, image_size, num_classes, latent_channels=channels), state)
    except ValueError:
        return model_config(name, published.image_size, num_classes, latent_channels=channels)


def _with_decoder(config: ModelConfig, state: Mapping[str, Tensor]) -> ModelConfig:
    """An MDTv2 with as many blocks in its decoder as the keys say: the authors' code takes the number as an option."""
    if not isinstance(config, MDTv2Config):
        return config
    blocks = {key.split(".")[1] for key in state if key.startswith(_DECODER)}
    return replace(config, decode_depth=len(blocks)) if blocks else config


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    return tuple(state[key].shape) if key in state else ()


def _check_pairs(path: Path, model: DiffusionTransformer, state: Mapping[str, Tensor]) -> None:
    """Bias tables with another order of pairs would be read as if they had ours."""
    for key, value in model.state_dict().items():
        if key.endswith(_PAIRS) and not torch.equal(state[key], value):
            raise UserError(f"{path}: {key!r} has other pairs of tokens than {model.config.name}; fetch the file again")


def _check_null_class(path: Path, config: ModelConfig, options: Any) -> None:
    """A training that never dropped labels has a row a class and no more; the options, where kept, tell."""
    classes = getattr(options, "num_classes", None)
    if isinstance(classes, int) and classes != config.num_classes:
        raise UserError(
            f"{path}: its label table has {config.num_classes + 1} rows for {classes} classes, where {classes + 1} are "
            "needed, the last one for the null class of guidance. Give a checkpoint of a training with class dropout."
        )

"""Read checkpoints that the authors of a family released: identify the model, and load its weights.

The model is identified by keys and shapes alone. These do not show what the model predicts: that is taken from the
training options if the file has them, and otherwise from the output's rows that only a variance trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from edt_core.errors import UserError
from edt_core.models.base import DiffusionTransformer
from edt_core.models.checkpoint_file import (
    WeightSet,
    WeightsName,
    check_dtypes,
    check_finite,
    check_storage,
    choose_weights,
    other_tensors,
    read_checkpoint,
    weight_sets,
)
from edt_core.models.config import ModelConfig
from edt_core.models.families import FAMILIES
from edt_core.models.families.family import ReleasedFormat, shape_of
from edt_core.models.training_options import (
    NO_WORDS,
    TrainingOptions,
    Words,
    check_against_config,
    check_objective,
    is_velocity,
    needed,
    option_notes,
)
from edt_core.models.zoo import MODEL_NAMES, build_model, family_of, model_config

_NO_VARIANCE = ": the model predicts no variance (it was built with learn_sigma=False), which is not supported"
_HALFWAY = "it is halfway between the two bounds of the learned range"


@dataclass(frozen=True)
class ReleasedModel:
    """A model of a checkpoint file, in evaluation mode on the CPU, its weights float32.

    `label` is the part of the file with its weights, empty for a bare state dict. `notes` are messages about what was
    assumed or ignored. `other_latents` are the file's options of an autoencoder that differs from the papers'.
    """

    model: DiffusionTransformer
    label: str
    is_average: bool
    notes: tuple[str, ...]
    other_latents: tuple[str, ...] = ()


def load_released(path: Path | str, weights: WeightsName | None = None) -> DiffusionTransformer:
    """The model of a checkpoint file; see `read_released_model`, which also returns what was assumed."""
    return read_released_model(path, weights).model


def read_released_model(
    path: Path | str, weights: WeightsName | None = None, words: Words = NO_WORDS, objective: str | None = None
) -> ReleasedModel:
    """Read a checkpoint file and check that its weights can be used as those of the model.

    `weights`: the averaged ones (ema) that the papers sample with, or the trained ones (model); None is the average
    if the file has one. A bare state dict has one set.

    `words`: the names in training options of the supported objectives other than noise prediction; the model's
    configuration gets the objective that the options name, or `objective` if they name none. A SiT has DiT's keys, and
    discards the second half of its output: that half is cut off, which changes no result.

    Raises:
        UserError: no checkpoint, code in it, missing weights, an objective that is not supported,
            keys and shapes of no known model, options of another model, weights that are not finite.
    """
    path = Path(path)
    content = read_checkpoint(path)
    options = TrainingOptions.of(content)
    found = check_objective(path, options, words, objective)
    sets = weight_sets(path, content)
    chosen = choose_weights(path, sets, weights)
    check_storage(path, chosen.tensors)
    config = replace(_identify(path, chosen.tensors), objective=found)
    check_against_config(path, options, config)
    if objection := _format(config).objection(chosen.tensors, options.state_schedule):
        raise UserError(f"{path}: it is a {config.name}, but {objection}. {needed(words)}")
    notes = _weight_notes(chosen, sets, weights, other_tensors(content, sets)) + option_notes(options, config, words)
    tensors = _format(config).completed(chosen.tensors)
    if velocity := is_velocity(path, options, words, objective):
        config, tensors = _without_variance(path, config, tensors, is_stated=bool(options.objectives(words)))
    model = build_model(config)
    _load(path, model, tensors)
    if not velocity:
        is_stated = "epsilon" in (objective, *options.objectives(words))
        notes += _check_variance(path, model, chosen.tensors, is_stated)
    return ReleasedModel(model.eval(), chosen.label, chosen.is_average, tuple(notes), options.other_latents)


def _load(path: Path, model: DiffusionTransformer, state: Mapping[str, Tensor]) -> None:
    """Check weights and load them into a model with the same keys and shapes."""
    own, is_derived = model.state_dict(), _format(model.config).is_derived
    check_dtypes(path, state, own)
    _check_derived(path, model, state)
    model.load_state_dict({key: own[key] if is_derived(key) else value for key, value in state.items()})
    check_finite(path, model.state_dict())


def _weight_notes(
    chosen: WeightSet, sets: list[WeightSet], weights: WeightsName | None, others: list[str]
) -> list[str]:
    notes = []
    if weights is None and chosen.label and not chosen.is_average:
        notes.append(f"the file has no keys of averaged (EMA) weights; the trained weights {chosen.label!r} were used")
    elif len(sets) > 1 or chosen.label not in ("", "ema", "model"):
        left = ", ".join(repr(s.label) for s in sets if s is not chosen)
        kind = "averaged (EMA)" if chosen.is_average else "trained"
        notes.append(f"the {kind} weights {chosen.label!r} were used" + (f", not {left}" if left else ""))
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        notes.append(f"other tensors of the file were ignored: {', '.join(others[:5])}{more}")
    return notes


def _without_variance(
    path: Path, config: ModelConfig, state: Mapping[str, Tensor], is_stated: bool
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The configuration and weights of a SiT without the second half of its output, which it discards.

    Raises UserError if that half was trained, unless the options state the objective: then the file is no SiT.
    """
    output = _format(config).output
    if not output:
        raise UserError(
            f"{path} is a {config.name}, whose output has no half that a SiT discards. Use a checkpoint of a SiT."
        )
    halves = {key: state[key].unflatten(0, (-1, 2, config.in_channels)) for key in output}  # [patch², 2, C, ...]
    if not is_stated and any(bool(half[:, 1].any()) for half in halves.values()):
        raise UserError(
            f"{path}: the output layer's rows for the variance were trained, as in a DiT, and a SiT never trains them. "
            "Only its name or the given objective says that it is a SiT. If it is a DiT, leave the objective out and "
            "rename the file."
        )
    return replace(config, outputs=1), {**state, **{key: half[:, 0].flatten(0, 1) for key, half in halves.items()}}


def _check_variance(path: Path, model: DiffusionTransformer, state: Mapping[str, Tensor], is_stated: bool) -> list[str]:
    """Notes about an untrained variance. Raises UserError if it is untrained, as in a SiT, and noise is not stated.

    `state` is that of the file. Models with adaptive norms start with an output layer of zeros. In a training that
    discards the second half of the channels, their rows have no gradient, so they stay exactly 0, also in the average.
    """
    if _format(model.config).lacks_variance(state):
        return [f"the model predicts no variance, and none was trained; {_HALFWAY}"]
    channels, own = model.config.in_channels, model.state_dict()
    halves = [own[key].unflatten(0, (-1, 2, channels)) for key in _format(model.config).output]  # [patch², 2, C, ...]
    has_noise, has_variance = (any(bool(half[:, i].any()) for half in halves) for i in range(2))
    if has_variance or not has_noise:
        return []
    if is_stated:
        return [f"the model's variance was not trained; {_HALFWAY}"]
    raise UserError(
        f"{path}: the output layer's rows for the variance are all 0, so they were never trained. This is the case "
        "for a SiT or another model that predicts a velocity, which has the keys of a "
        f"{model.config.name}, but must not be sampled as one. Nothing in the file says which it is. For a SiT import "
        "it with --objective flow, or with SiT in the file's name; other models of a velocity are not supported."
    )


@dataclass(frozen=True)
class _Fit:
    """The differences of a state dict from that of a model: a line for each key, in the model's order."""

    config: ModelConfig
    differences: tuple[str, ...]


def _identify(path: Path, state: Mapping[str, Tensor]) -> ModelConfig:
    """The configuration whose state dict has exactly these keys and shapes. Raises UserError with the closest one."""
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
        + (_NO_VARIANCE if _lacks_variance(best, state) else "")
        + ". Use a checkpoint of one of these models, or train one here."
    )


def _lacks_variance(fit: _Fit, state: Mapping[str, Tensor]) -> bool:
    """Whether the only difference is an output layer of half the size."""
    rows = fit.config.patch_size**2 * fit.config.in_channels
    output = _format(fit.config).output
    return len(fit.differences) == len(output) and all(shape_of(state, key)[:1] == (rows,) for key in output)


def _fit(name: str, state: Mapping[str, Tensor]) -> _Fit:
    """The model `name` with the state dict's own resolution, classes and channels, and the differences from it."""
    config = _config_like(name, state)
    expected = _shapes(config)
    shapes = {key: tuple(value.shape) for key, value in _format(config).completed(state).items()}
    differences = [
        f"{key!r} is missing" if key not in shapes else f"{key!r} has shape {list(shapes[key])}, not {list(shape)}"
        for key, shape in expected.items()
        if shapes.get(key) != shape
    ]
    differences += [f"{key!r} is not a key of it" for key in shapes if key not in expected]
    return _Fit(config, tuple(differences))


@lru_cache(maxsize=256)  # all known models, in a few sizes
def _shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The keys and shapes of a model's state dict, in its order."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build_model(config).state_dict().items()}


def _config_like(name: str, state: Mapping[str, Tensor]) -> ModelConfig:
    """A named model with the numbers from the shapes; missing or invalid numbers are as published."""
    published, released = model_config(name), family_of(name).released
    num_classes = released.num_classes(state) or published.num_classes
    channels = released.channels(state) or published.in_channels
    try:
        image_size = released.grid(state) * published.patch_size * published.autoencoder_factor
        config = model_config(name, image_size, num_classes, latent_channels=channels)
        return replace(config, **released.numbers(state))
    except ValueError:
        return model_config(name, published.image_size, num_classes, latent_channels=channels)


def _format(config: ModelConfig) -> ReleasedFormat:
    return FAMILIES[config.architecture].released


def _check_derived(path: Path, model: DiffusionTransformer, state: Mapping[str, Tensor]) -> None:
    """Raise UserError if a bias table has another order of pairs of tokens than the model."""
    is_derived = _format(model.config).is_derived
    for key, value in model.state_dict().items():
        # Half precision rounds large indices; the model's are rounded in the same way for the comparison.
        if is_derived(key) and not torch.equal(state[key].double(), value.to(state[key].dtype).double()):
            raise UserError(
                f"{path}: {key!r} has other pairs of tokens than {model.config.name}; download the file again"
            )

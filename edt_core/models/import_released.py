"""Read checkpoints that the authors of a family released: which model they hold, and its weights.

Which of the named models it is follows from keys and shapes alone. Those do not say what the model predicts; the
options of the training say it where the file has them, and else the rows of the output that only a variance trains.
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
    needed,
    option_notes,
)
from edt_core.models.zoo import MODEL_NAMES, build_model, family_of, model_config

_NO_VARIANCE = ": the model predicts no variance (it was built with learn_sigma=False), which is not supported"
_HALFWAY = "it is halfway between the two bounds of the learned range"


@dataclass(frozen=True)
class ReleasedModel:
    """A model of a checkpoint file, in evaluation mode on the CPU, its weights float32.

    `label` is the part of the file that its weights were taken from, empty for a bare state dict. `notes` are what was
    assumed or left aside. `other_latents` are the file's options of another autoencoder than the papers'.
    """

    model: DiffusionTransformer
    label: str
    is_average: bool
    notes: tuple[str, ...]
    other_latents: tuple[str, ...] = ()


def load_released(path: Path | str, weights: WeightsName | None = None) -> DiffusionTransformer:
    """The model of a checkpoint file; see `read_released_model`, which also tells what was assumed."""
    return read_released_model(path, weights).model


def read_released_model(path: Path | str, weights: WeightsName | None = None, words: Words = NO_WORDS) -> ReleasedModel:
    """Read a checkpoint file and check that its weights mean what they are taken for.

    `weights`: the averaged ones (ema) that the papers sample with, or those being trained (model); None is the average
    where the file has one. A bare state dict has one set.

    `words`: how training options name the objectives beside noise prediction that may be read; the model's
    configuration gets the one that they name.

    Raises:
        UserError: no checkpoint, code in it, other weights than asked for, an objective that may not be read,
            keys and shapes of no known model, options of another model, weights that are not finite.
    """
    path = Path(path)
    content = read_checkpoint(path)
    options = TrainingOptions.of(content)
    objective = check_objective(path, options, words)
    sets = weight_sets(path, content)
    chosen = choose_weights(path, sets, weights)
    check_storage(path, chosen.tensors)
    config = replace(_identify(path, chosen.tensors), objective=objective)
    check_against_config(path, options, config)
    if objection := _format(config).objection(chosen.tensors, options.state_schedule):
        raise UserError(f"{path}: it is a {config.name}, but {objection}. {needed(words)}")
    model = build_model(config)
    _load(path, model, _format(config).completed(chosen.tensors))
    notes = _weight_notes(chosen, sets, weights, other_tensors(content, sets)) + option_notes(options, config, words)
    notes += _check_variance(path, model, chosen.tensors, options.objectives(words) == ["epsilon"])
    return ReleasedModel(model.eval(), chosen.label, chosen.is_average, tuple(notes), options.other_latents)


def _load(path: Path, model: DiffusionTransformer, state: Mapping[str, Tensor]) -> None:
    """Put checked weights into a model whose keys and shapes they have."""
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
        notes.append(
            f"no averaged (EMA) weights were found by their keys; the trained weights {chosen.label!r} were taken"
        )
    elif len(sets) > 1 or chosen.label not in ("", "ema", "model"):
        left = ", ".join(repr(s.label) for s in sets if s is not chosen)
        kind = "averaged (EMA)" if chosen.is_average else "trained"
        notes.append(f"the {kind} weights {chosen.label!r} were taken" + (f", not {left}" if left else ""))
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        notes.append(f"other tensors of the file were ignored: {', '.join(others[:5])}{more}")
    return notes


def _check_variance(path: Path, model: DiffusionTransformer, state: Mapping[str, Tensor], is_stated: bool) -> list[str]:
    """Raise UserError where the outputs for the variance were never trained, as in a SiT; a note where noise prediction
    is stated.

    `state` is what the file holds. Models with adaptive norms start with an output layer of zeros. A training that
    discards the second half of the channels gives their rows no gradient, so they stay exactly 0, in the average too.
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
        f"{path}: the output layer's rows for the variance are all 0, so they were never trained. A SiT or another "
        "model that predicts a velocity is like that; it has the keys of a "
        f"{model.config.name}, but must not be sampled as one. edt samples models that predict noise (epsilon) and a "
        "variance; other objectives are not supported. Give a checkpoint of such a model."
    )


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
        + (_NO_VARIANCE if _lacks_variance(best, state) else "")
        + ". Give a checkpoint of one of these models, or train one here."
    )


def _lacks_variance(fit: _Fit, state: Mapping[str, Tensor]) -> bool:
    """Whether an output layer of half the size is all that differs."""
    rows = fit.config.patch_size**2 * fit.config.in_channels
    output = _format(fit.config).output
    return len(fit.differences) == len(output) and all(shape_of(state, key)[:1] == (rows,) for key in output)


def _fit(name: str, state: Mapping[str, Tensor]) -> _Fit:
    """The model of this name with the state dict's own resolution, classes and channels, and where it differs."""
    config = _config_like(name, state)
    expected = _shapes(config)
    found = {key: tuple(value.shape) for key, value in _format(config).completed(state).items()}
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
    """Bias tables with another order of pairs would be read as if they had ours."""
    is_derived = _format(model.config).is_derived
    for key, value in model.state_dict().items():
        # Half precision rounds large indices; ours are rounded the same way to compare.
        if is_derived(key) and not torch.equal(state[key].double(), value.to(state[key].dtype).double()):
            raise UserError(f"{path}: {key!r} has other pairs of tokens than {model.config.name}; fetch the file again")

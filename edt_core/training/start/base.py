"""The model that a training starts from, in memory, and what of it fits the new model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from edt_core.errors import UserError
from edt_core.models import ModelConfig

# Fields of a model's configuration in which the new model may differ: they change no weight, or the weights are adapted
# to them (another image size, other classes).
_FREE = {
    *("name", "latent_size", "num_classes", "amm_blocks", "amm_kernel", "amm_radius"),
    *("amm_radius_rows", "amm_in_training"),
    *("latents_mean", "latents_std"),  # the new model keeps the base's, see `keep_statistics`
    *("down_mask_ratios", "mid_mask_block", "mid_mask_ratio", "mask_ratio", "input_mask_ratio"),
}
_SHOWN = 5  # class names in a message


@dataclass(frozen=True)
class SavedOptimizer:
    """The state of an optimizer as a checkpoint holds it; `name` is that of `train.optimizer`."""

    name: str
    tensors: Mapping[str, Tensor]
    groups: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Base:
    """A trained model. `weights` is its state dict, `classes` the names of its classes, () where they are not known.

    `origin` is where it was read from, for messages, and `digest` identifies it. `optimizer` is None where the source
    has none or none was asked. `num_timesteps` is that of its training, None where it is not known.
    """

    config: ModelConfig
    weights: Mapping[str, Tensor]
    origin: str
    classes: tuple[str, ...] = ()
    optimizer: SavedOptimizer | None = None
    autoencoder_digest: str | None = None
    digest: str | None = None
    num_timesteps: int | None = None


def check_fit(origin: str, base: ModelConfig, config: ModelConfig) -> None:
    """Raise UserError unless the weights of a base model can be adapted to the new model, naming both values."""
    before, now = _numbers(base), _numbers(config)
    differing = [
        f"{name} {before[name]!r}, and the new model has {now[name]!r}"
        for name in now
        if name in before and before[name] != now[name]
    ]
    if differing:
        raise UserError(
            f"train.init_from: {origin} ({base.name}) does not fit {config.name}: it has "
            f"{'; '.join(differing)}. Start from a model of the same kind, or set train.model, train.objective and the "
            "autoencoder to those of the base model"
        )


def keep_statistics(origin: str, base: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """The configuration of the new model with the statistics of the latents that the base model was trained on.

    `base` is the base model's configuration as plain values. Its weights know latents of that scale alone. Raises
    UserError if the new model is to have normalised latents and the base model has not.
    """
    mean, std = base.get("latents_mean"), base.get("latents_std")
    if mean is None and config.latents_mean is not None:
        raise not_normalised(origin)
    if mean is None or len(mean) != config.in_channels:  # `check_fit` refuses other channels
        return config
    return replace(config, latents_mean=tuple(mean), latents_std=std and tuple(std))


def not_normalised(origin: str) -> UserError:
    """The error for a training on normalised latents from a model that knows others."""
    return UserError(
        f"train.latent_norm is true, but train.init_from is {origin}, which was trained on latents that are not "
        "normalised by channel; set train.latent_norm=false, or train from random weights (train.init_from=null)"
    )


def _numbers(config: ModelConfig) -> dict[str, Any]:
    fields = {name: value for name, value in asdict(config).items() if name not in _FREE}
    return {"architecture": config.architecture, **fields}


@dataclass(frozen=True)
class ClassRows:
    """Where the class rows of a new model come from.

    `rows[i]` is the row of the base model for class i, None for a class that the base model does not have. `new` and
    `dropped` are the names of the classes that only the new, and only the base model has.
    """

    rows: tuple[int | None, ...]
    new: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def __str__(self) -> str:
        common = len(self.rows) - len(self.new)
        parts = [f"{common} of {len(self.rows)} classes take their rows from the base model"]
        parts += [f"{len(self.new)} are new ({listed(self.new)})"] if self.new else []
        parts += [f"{len(self.dropped)} are dropped ({listed(self.dropped)})"] if self.dropped else []
        return "; ".join(parts)


def class_rows(base: Base, names: Sequence[str], num_classes: int) -> ClassRows:
    """Match the classes of the new model to those of the base model, by name if both sides have names.

    Without names on one side they are matched in order if there are as many. If there are not, all classes of the new
    model are new to a base model without names, such as a published checkpoint.

    Raises UserError if no name matches, or if the numbers differ and the new model has no names.
    """
    if not (base.classes and names):
        if base.config.num_classes == num_classes:
            return ClassRows(tuple(range(num_classes)))
        if names:
            return ClassRows((None,) * num_classes, new=tuple(names))
        raise UserError(
            f"train.init_from: {base.origin} has {base.config.num_classes} classes and the new model has "
            f"{num_classes}, and the class names of the new model are not known, so their rows cannot be matched by "
            "name. Give the images artifact (--images)"
        )
    place = {name: row for row, name in enumerate(base.classes)}
    rows = tuple(place.get(name) for name in names)
    if all(row is None for row in rows):
        raise UserError(
            f"train.init_from: {base.origin} and the images have no class name in common: the base model has "
            f"{listed(base.classes)}, the images have {listed(names)}. Name the classes of the images as the base "
            "model names them, or start from another model"
        )
    known = set(names)
    return ClassRows(
        rows,
        tuple(name for name in names if name not in place),
        tuple(name for name in base.classes if name not in known),
    )


def listed(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

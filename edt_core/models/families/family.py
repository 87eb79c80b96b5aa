"""What a model family states of itself, so that the code around the models asks no configuration which one it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from edt_core.models.base import DiffusionTransformer
from edt_core.models.config import ModelConfig
from edt_core.models.families.amm_placements import AmmPlacement


@dataclass(frozen=True)
class ModelSize:
    """What a name means: `numbers` of its configuration, and the autoencoder that it is made for."""

    numbers: Mapping[str, Any]
    autoencoder_factor: int = 8


def one_width(width: tuple[int, int, int], *, autoencoder_factor: int = 8, **numbers: Any) -> ModelSize:
    """A model of depth, width and heads, for an `OneWidthConfig`; `numbers` are further ones of its configuration."""
    depth, dim, num_heads = width
    return ModelSize({"depth": depth, "dim": dim, "num_heads": num_heads, **numbers}, autoencoder_factor)


class ReleasedFormat:
    """How the checkpoints that a family's authors release are known and read: by default as DiT's.

    Any one of `marks` is a key of a set of weights. `output` are the keys of the last layer, whose rows are noise and
    variance in turn, where that layer begins as zero, so that rows of zeros were never trained; else (). Keys that end
    in `derived` follow from the configuration alone and are checked, not loaded.
    """

    marks: ClassVar[tuple[str, ...]] = (
        "x_embedder.proj.weight",
        "t_embedder.mlp.0.weight",
        "y_embedder.embedding_table.weight",
        "final_layer.linear.weight",
    )
    positions: ClassVar[str] = "pos_embed"
    labels: ClassVar[str] = "y_embedder.embedding_table.weight"
    patches: ClassVar[str] = "x_embedder.proj.weight"
    output: ClassVar[tuple[str, ...]] = ("final_layer.linear.weight", "final_layer.linear.bias")
    derived: ClassVar[str | None] = None

    def grid(self, state: Mapping[str, Tensor]) -> int:
        """Side of the square of tokens, 0 where the state does not say it."""
        shape = shape_of(state, self.positions)
        return math.isqrt(shape[1]) if len(shape) == 3 else 0

    def num_classes(self, state: Mapping[str, Tensor]) -> int | None:
        """Classes without the null class, which is the last row; None where the state does not say it."""
        shape = shape_of(state, self.labels)
        return shape[0] - 1 if shape and shape[0] > 1 else None

    def channels(self, state: Mapping[str, Tensor]) -> int | None:
        """Channels of the latents, None where the state does not say it."""
        shape = shape_of(state, self.patches)
        return shape[1] if len(shape) == 4 and shape[1] else None

    def numbers(self, state: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Further numbers of the configuration that the state says."""
        return {}

    def lacks_variance(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the model was made without an output for the variance, and `completed` adds one."""
        return False

    def completed(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state dict with all that the model here has: an output of 0 for a variance that is lacking."""
        return state

    def objection(self, state: Mapping[str, Tensor], is_linear: bool) -> str:
        """Why these weights cannot be sampled here, where keys and shapes show it; else empty.

        `is_linear`: options in the file say that they were trained on the linear noise schedule.
        """
        return ""

    def is_derived(self, key: str) -> bool:
        """Whether a tensor follows from the configuration alone."""
        return self.derived is not None and key.endswith(self.derived)


def shape_of(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """The shape of a tensor of a state dict, () where it is missing."""
    return tuple(state[key].shape) if key in state else ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of model, in sizes with names. Its file in `edt_core.models.families` is all there is of it.

    `paper` is an arXiv number with "arXiv " before it. `released_sampling` are fields of the sampling configuration
    with which a checkpoint of the authors is sampled.
    """

    title: str
    long_name: str
    paper: str
    config: type[ModelConfig]
    model: type[DiffusionTransformer]
    sizes: Mapping[str, ModelSize]
    amm_placements: tuple[AmmPlacement, ...] = ()  # the first one that fits counts
    released: ReleasedFormat = field(default_factory=ReleasedFormat)
    released_sampling: Mapping[str, Any] = field(default_factory=lambda: {"amm_blocks": "model"})

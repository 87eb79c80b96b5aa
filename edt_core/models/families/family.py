"""The interface of a model family to the code around it, which needs no case distinctions by family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from edt_core.models.base import DiffusionTransformer
from edt_core.models.config import ModelConfig
from edt_core.models.families.amm_placements import AmmPlacement
from edt_core.models.families.depth import Depth


@dataclass(frozen=True)
class ModelSize:
    """The size behind a model's name: `numbers` of its configuration, and the factor of its autoencoder."""

    numbers: Mapping[str, Any]
    autoencoder_factor: int = 8


def one_width(width: tuple[int, int, int], *, autoencoder_factor: int = 8, **numbers: Any) -> ModelSize:
    """The size of depth, width and heads for an `OneWidthConfig`; `numbers` are further fields."""
    depth, dim, num_heads = width
    return ModelSize({"depth": depth, "dim": dim, "num_heads": num_heads, **numbers}, autoencoder_factor)


class ReleasedFormat:
    """How to recognise and read the checkpoints that a family's authors release. The defaults are DiT's.

    A key in `marks` marks a set of weights. `output` are the keys of the last layer, whose rows alternate between
    noise and variance, if that layer starts as zero, so that rows of zeros were never trained; otherwise ().
    Keys that end in `derived` depend on the configuration alone and are checked, not loaded.
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
        """Side of the square of tokens, 0 if the state does not show it."""
        shape = shape_of(state, self.positions)
        return math.isqrt(shape[1]) if len(shape) == 3 else 0

    def num_classes(self, state: Mapping[str, Tensor]) -> int | None:
        """Classes without the null class, which is the last row; None if the state does not show it."""
        shape = shape_of(state, self.labels)
        return shape[0] - 1 if shape and shape[0] > 1 else None

    def channels(self, state: Mapping[str, Tensor]) -> int | None:
        """Channels of the latents, None if the state does not show it."""
        shape = shape_of(state, self.patches)
        return shape[1] if len(shape) == 4 and shape[1] else None

    def numbers(self, state: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Further fields of the configuration that the state shows."""
        return {}

    def lacks_variance(self, state: Mapping[str, Tensor]) -> bool:
        """Whether the model has no output for the variance, so that `completed` adds one."""
        return False

    def completed(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state dict with all tensors of the model here: a missing variance gets an output of 0."""
        return state

    def objection(self, state: Mapping[str, Tensor], is_linear: bool) -> str:
        """Why these weights cannot be sampled here, as far as keys and shapes show it; "" if they can.

        `is_linear`: options in the file state the linear noise schedule.
        """
        return ""

    def is_derived(self, key: str) -> bool:
        """Whether a tensor depends on the configuration alone."""
        return self.derived is not None and key.endswith(self.derived)


def shape_of(state: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """The shape of a tensor of a state dict, () if it is missing."""
    return tuple(state[key].shape) if key in state else ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of model, with its named sizes. It is defined entirely by its file in `edt_core.models.families`.

    `paper` is "arXiv " and an arXiv number. `released_sampling` are the fields of the sampling configuration for a
    checkpoint of the authors. `overridable` are the fields of a named model's configuration that a training may set
    (`train.model_overrides`). `depth` says which blocks may be left out, None where none may.
    """

    title: str
    long_name: str
    paper: str
    config: type[ModelConfig]
    model: type[DiffusionTransformer]
    sizes: Mapping[str, ModelSize]
    amm_placements: tuple[AmmPlacement, ...] = ()  # the first one that fits is used
    released: ReleasedFormat = field(default_factory=ReleasedFormat)
    released_sampling: Mapping[str, Any] = field(default_factory=lambda: {"amm_blocks": "model"})
    overridable: tuple[str, ...] = ()
    depth: Depth | None = None

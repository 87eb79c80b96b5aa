"""What a training aligns with what: blocks, widths and grids, from its configuration and the model's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from edt_core.diffusion import objective_of
from edt_core.errors import UserError
from edt_core.models import ModelConfig, shadow

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

# SRA's for 28 blocks, those of DiT-XL and, with continuous times, of SiT-XL. REPA's SiT-XL has block 8 too.
_PUBLISHED = {(28, False): (8, 16), (28, True): (8, 20)}
_SMOOTH_L1_WEIGHTS = {"autoencoder": 1.0, "self": 0.2, "features": 0.5}
_COSINE_WEIGHT = 0.5
_REPA_LAYERS = (2048, 2048)  # between the hidden states and the features, in REPA's code


@dataclass(frozen=True)
class TokenShape:
    """Tokens on a square of `grid` x `grid`, of `width` features each."""

    grid: int
    width: int


@dataclass(frozen=True)
class AlignSettings:
    """The hidden states after the first `block` blocks, and what they are aligned with.

    `target_block` is the number of blocks of the EMA model before the target, None for another target. `layers` are the
    widths between the hidden states and the target in the head.
    """

    kind: str
    block: int
    target_block: int | None
    hidden: TokenShape
    target: TokenShape
    layers: tuple[int, ...]
    distance: str
    weight: float

    @property
    def grid(self) -> int:
        """The coarser grid of both, on which they are compared."""
        return min(self.hidden.grid, self.target.grid)

    @property
    def head_widths(self) -> tuple[int, ...]:
        """Widths of the head's layers, from the hidden states to the target."""
        return self.hidden.width, *self.layers, self.target.width


def align_settings(config: TrainConfig, model_config: ModelConfig) -> AlignSettings | None:
    """The settings of a training; None without `train.align`. Raises UserError for a block that does not exist."""
    if config.align is None:
        return None
    shapes = _block_shapes(model_config)
    kind = len(shapes), objective_of(config.objective).continuous
    first, second = _PUBLISHED.get(kind, _thirds(len(shapes)))
    block = config.align_block or first
    target_block = (config.align_target_block or second) if config.align == "self" else None
    _check("align_block", block, model_config)
    if target_block is not None:
        _check("align_target_block", target_block, model_config)
    hidden, of_features = shapes[block - 1], config.align == "features"
    if target_block is not None:
        target = shapes[target_block - 1]
    elif of_features:
        target = _of_features(config, hidden, model_config)
    else:
        target = TokenShape(model_config.grid, model_config.patch_size**2 * model_config.in_channels)
    distance = config.align_distance or ("cosine" if of_features else "smooth_l1")
    usual = _SMOOTH_L1_WEIGHTS[config.align] if distance == "smooth_l1" else _COSINE_WEIGHT
    return AlignSettings(
        kind=config.align,
        block=block,
        target_block=target_block,
        hidden=hidden,
        target=target,
        layers=_REPA_LAYERS if of_features else (hidden.width + target.width,),  # as in SRA's code
        distance=distance,
        weight=usual if config.align_weight is None else config.align_weight,
    )


def _of_features(config: TrainConfig, hidden: TokenShape, model_config: ModelConfig) -> TokenShape:
    target = TokenShape(*config.align_features)
    if max(target.grid, hidden.grid) % min(target.grid, hidden.grid):
        raise UserError(
            f"the target of train.align has {target.grid} x {target.grid} tokens and that block of {model_config.name} "
            f"has {hidden.grid} x {hidden.grid}; one must divide the other: set train.align_block to a block with "
            "another grid, or use images of another size"
        )
    return target


def _thirds(blocks: int) -> tuple[int, int]:
    """A third and two thirds of the blocks: 4 and 8 of 12, SRA's default."""
    return max(1, round(blocks / 3)), max(1, round(2 * blocks / 3))


def _check(field: str, block: int, model_config: ModelConfig) -> None:
    if block > model_config.num_blocks:
        raise UserError(
            f"train.{field} is {block}, but {model_config.name} has {model_config.num_blocks} blocks; use a number "
            f"from 1 to {model_config.num_blocks}, or leave it out"
        )


@lru_cache(maxsize=64)
def _block_shapes(model_config: ModelConfig) -> tuple[TokenShape, ...]:
    """The tokens that each block returns, in forward order, without those that are no patches."""
    attentions = shadow(model_config).attentions()
    return tuple(TokenShape(attention.grid, attention.proj.in_features) for attention in attentions)

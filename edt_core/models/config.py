"""The numbers that define a model: its blocks, where attention is modulated and where tokens are masked.

Legend: a *grid* is the side of a square of tokens, so a stage has grid² tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from edt_core.errors import UserError

AmmKernel = Literal["exp_cos", "cos"]
RatioRange = tuple[float, float]

AMM_KERNELS: tuple[AmmKernel, ...] = ("exp_cos", "cos")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """What every model has; the architectures add their own numbers, and nothing else is needed to build one.

    `latent_size` is the side of the square latents. `amm_blocks` are 0-based indices over all blocks in forward order,
    `amm_radius` is in tokens of a block's grid, None for the paper's (see `amm_matrix`).

    Raises:
        ValueError: the numbers do not make a model; the message says which, and what would.
    """

    architecture: ClassVar[str]

    name: str
    latent_size: int
    in_channels: int = 4
    patch_size: int = 2
    autoencoder_factor: int = 8
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    amm_blocks: tuple[int, ...] = ()
    amm_kernel: AmmKernel = "exp_cos"
    amm_radius: float | None = None

    def __post_init__(self) -> None:
        """Check that the numbers make a model."""
        if self.num_classes < 1:
            raise ValueError(f"{self.name}: num_classes is {self.num_classes}; it must be at least 1.")
        _check_latent_size(self)
        _check_amm(self)

    @property
    def image_size(self) -> int:
        """Side of the decoded images in pixels."""
        return self.latent_size * self.autoencoder_factor

    @property
    def out_channels(self) -> int:
        """Channels of the output: predicted noise, and interpolation of the variance (learned sigma)."""
        return 2 * self.in_channels

    @property
    def grid(self) -> int:
        """Side of the square of tokens that the latents are cut into."""
        return self.latent_size // self.patch_size

    @property
    @abstractmethod
    def cond_dim(self) -> int:
        """Width of the conditioning vector, which is that of the first tokens."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Blocks in the forward pass."""

    @property
    def num_merges(self) -> int:
        """How many times the grid is halved."""
        return 0

    @property
    def is_masked(self) -> bool:
        """Whether the model has a masked forward pass to train with."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON keeps (tuples become lists there; `from_dict` turns them back)."""
        return {"architecture": self.architecture, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`, also after a trip through JSON. Without an architecture, as of old, it is an EDT.

        Raises:
            ValueError: unknown keys, missing keys, or numbers that do not fit.
        """
        given = dict(values)
        architecture = given.pop("architecture", EDTConfig.architecture)
        if architecture not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
        made = ARCHITECTURES[architecture]
        known = {field.name: field for field in fields(made)}
        unknown = sorted(set(given) - set(known))
        missing = sorted(name for name, field in known.items() if field.default is MISSING and name not in given)
        if unknown or missing:
            raise ValueError(
                f"This is not a {made.__name__}: unknown keys {unknown}, missing keys {missing}. "
                f"Known keys are {sorted(known)}."
            )
        return made(**{key: _as_tuple(value) for key, value in given.items()})


@dataclass(frozen=True)
class StageSpec:
    """One stage of the hourglass: `depth` blocks of width `dim` on a grid x grid square of tokens."""

    depth: int
    dim: int
    num_heads: int
    grid: int
    first_block: int

    @property
    def blocks(self) -> range:
        """Indices of the stage's blocks among all blocks of the model."""
        return range(self.first_block, self.first_block + self.depth)


@dataclass(frozen=True, kw_only=True)
class EDTConfig(ModelConfig):
    """An hourglass (arXiv 2410.23788).

    `dims`, `num_heads` and `depths` have one entry a stage. Of an odd number of stages, those before the middle one
    each end in a module that halves the grid, those after it begin by doubling it. `down_mask_ratios` has a range of
    mask ratios for each down-sampling module; `mid_mask_block`, if not None, is the block of the first stage whose
    input is masked too, with a ratio from `mid_mask_ratio` (a ratio is the share of tokens taken away, in 0..1).
    """

    architecture: ClassVar[str] = "edt"

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    down_mask_ratios: tuple[RatioRange, ...] = ((0.4, 0.5), (0.1, 0.2))
    mid_mask_block: int | None = None
    mid_mask_ratio: RatioRange = (0.15, 0.25)

    def __post_init__(self) -> None:
        """Check that the numbers make an hourglass."""
        _check_hourglass(self)
        super().__post_init__()
        _check_masks(self)

    @property
    def cond_dim(self) -> int:
        """Width of the conditioning vector, which is that of the first stage."""
        return self.dims[0]

    @property
    def num_blocks(self) -> int:
        """Blocks of all stages together."""
        return sum(self.depths)

    @property
    def num_merges(self) -> int:
        """How many times the hourglass halves its grid."""
        return len(self.depths) // 2

    @property
    def is_masked(self) -> bool:
        """Masks act inside the down-sampling modules."""
        return True

    @property
    def stages(self) -> tuple[StageSpec, ...]:
        """The stages in forward order."""
        last = len(self.depths) - 1
        return tuple(
            StageSpec(depth, dim, heads, self.grid >> min(i, last - i), sum(self.depths[:i]))
            for i, (depth, dim, heads) in enumerate(zip(self.depths, self.dims, self.num_heads, strict=True))
        )


@dataclass(frozen=True, kw_only=True)
class DiTConfig(ModelConfig):
    """`depth` blocks of width `dim` on one grid (DiT, arXiv 2212.09748)."""

    architecture: ClassVar[str] = "dit"

    depth: int
    dim: int
    num_heads: int

    def __post_init__(self) -> None:
        """Check that the numbers make a model."""
        _check_width(self.name, self.dim, self.num_heads)
        if self.depth < 1:
            raise ValueError(f"{self.name}: depth is {self.depth}; it must be at least 1.")
        super().__post_init__()

    @property
    def cond_dim(self) -> int:
        """Width of the conditioning vector, which is that of the tokens."""
        return self.dim

    @property
    def num_blocks(self) -> int:
        """Blocks in the forward pass."""
        return self.depth


@dataclass(frozen=True, kw_only=True)
class MDTv2Config(DiTConfig):
    """A DiT in an encoder, with skips from its first half to its second, and a decoder (MDTv2, arXiv 2303.14389).

    The last `decode_depth` of the `depth` blocks are the decoder's; 4 is the default of its authors' code. In the
    masked pass of training a share of tokens from the range `mask_ratio` is taken away before the encoder.
    """

    architecture: ClassVar[str] = "mdtv2"

    decode_depth: int = 4
    mask_ratio: RatioRange = (0.3, 0.5)

    def __post_init__(self) -> None:
        """Check that the numbers make a model."""
        super().__post_init__()
        encoder = self.depth - self.decode_depth
        if self.decode_depth < 1 or encoder < 2 or encoder % 2:
            raise ValueError(
                f"{self.name}: {self.depth} blocks with a decoder of {self.decode_depth} leave {encoder} for the "
                "encoder, whose first half is joined to its second: leave an even number from 2 on."
            )
        _check_ratios(self.name, [self.mask_ratio])

    @property
    def is_masked(self) -> bool:
        """The encoder runs on the tokens that are kept."""
        return True


ARCHITECTURES: dict[str, type[ModelConfig]] = {made.architecture: made for made in (EDTConfig, DiTConfig, MDTv2Config)}


def _as_tuple(value: Any) -> Any:
    """Lists to tuples, at any depth."""
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value


def _check_hourglass(config: EDTConfig) -> None:
    lengths = {len(config.depths), len(config.dims), len(config.num_heads)}
    if len(lengths) != 1 or len(config.depths) % 2 == 0 or len(config.depths) < 3:
        raise ValueError(
            f"{config.name}: depths {config.depths}, dims {config.dims} and num_heads {config.num_heads} "
            "must have the same odd number of entries, one a stage, 3 or more."
        )
    if config.dims != config.dims[::-1]:
        raise ValueError(
            f"{config.name}: dims {config.dims} must read the same from both ends, since a long skip "
            "joins the stages that mirror each other."
        )
    for dim, heads in zip(config.dims, config.num_heads, strict=True):
        _check_width(config.name, dim, heads)


def _check_width(name: str, dim: int, heads: int) -> None:
    if dim < 1 or heads < 1 or dim % heads or dim % 4:
        raise ValueError(
            f"{name}: blocks of width {dim} with {heads} heads; the width must be a multiple of "
            "the number of heads, and of 4 for the sine-cosine position embedding."
        )


def _check_latent_size(config: ModelConfig) -> None:
    multiple = config.patch_size * 2**config.num_merges
    if config.latent_size < multiple or config.latent_size % multiple:
        merged = f" and merged {config.num_merges} times by 2" if config.num_merges else ""
        raise ValueError(
            f"{config.name}: latents of {config.latent_size}x{config.latent_size} cannot be cut into "
            f"patches of {config.patch_size}{merged}. Use a multiple of "
            f"{multiple}, that is an image size that is a multiple of {multiple * config.autoencoder_factor}."
        )


def _check_amm(config: ModelConfig) -> None:
    check_amm_blocks(config, config.amm_blocks)
    if config.amm_kernel not in AMM_KERNELS:
        raise UserError(f"{config.name}: unknown amm_kernel {config.amm_kernel!r}. Known: {', '.join(AMM_KERNELS)}.")
    if config.amm_radius is not None and not 0.0 < config.amm_radius < math.inf:
        raise UserError(
            f"{config.name}: amm_radius is {config.amm_radius} tokens; it must be above 0, or None for the paper's."
        )


def check_amm_blocks(config: ModelConfig, blocks: Sequence[int]) -> None:
    """Raise UserError unless every index in `blocks` names a block of the model."""
    outside = [block for block in blocks if not 0 <= block < config.num_blocks]
    if outside:
        raise UserError(
            f"{config.name}: amm_blocks {outside} do not exist. The model has {config.num_blocks} blocks; "
            f"use indices 0..{config.num_blocks - 1}."
        )


def _check_masks(config: EDTConfig) -> None:
    if len(config.down_mask_ratios) != config.num_merges:
        raise ValueError(
            f"{config.name}: {len(config.down_mask_ratios)} ranges in down_mask_ratios for "
            f"{config.num_merges} down-sampling modules; give one range for each."
        )
    _check_ratios(config.name, [*config.down_mask_ratios, config.mid_mask_ratio])
    if config.mid_mask_block is not None and not 0 <= config.mid_mask_block < config.depths[0]:
        raise ValueError(
            f"{config.name}: mid_mask_block is {config.mid_mask_block}, but a masked token is replaced by "
            "the first stage's position embedding, so it must be one of that stage's blocks "
            f"0..{config.depths[0] - 1}."
        )


def _check_ratios(name: str, ranges: Sequence[RatioRange]) -> None:
    for low, high in ranges:
        if not 0.0 <= low <= high < 1.0:
            raise ValueError(f"{name}: mask ratios {low}..{high} are not a range within 0..1 (1 excluded).")

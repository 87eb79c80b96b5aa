"""The configuration of a model: its blocks, where attention is modulated and where tokens are masked.

Legend: a *grid* is the side of a square of tokens, so a stage has grid² tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

from edt_core.errors import UserError
from edt_core.models.mask_form import MaskForm, MaskSite, RatioRange
from edt_core.models.quantized.record import Quantization

AmmKernel = Literal["exp_cos", "cos"]
_ADDED = (
    *("objective", "outputs", "latents_mean", "latents_std"),
    *("token_enhancement", "position_supplement", "input_mask_ratio"),
    *("amm_radius_rows", "amm_in_training", "quantization"),
)

AMM_KERNELS: tuple[AmmKernel, ...] = ("exp_cos", "cos")
_ARCHITECTURES: dict[str, type[ModelConfig]] = {}  # by the name in a stored configuration
_FIRST_ARCHITECTURE = "edt"  # of stored configurations without a name


class LatentSizeError(ValueError):
    """The side of the latents cannot be divided into a model's patches."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """The fields that every model has; families add their own. A configuration is all that is needed to build a model.

    `from_dict` selects a family's configuration by its `architecture`. `mask_form` is the content of its masks, None
    for a family without a masked forward pass. `only_objective` is the objective of a family that has one alone.

    `latent_size` is the side of the square latents. `amm_blocks` are 0-based indices over all blocks in forward order.
    `amm_radius` is in tokens of a block's grid, and `amm_radius_rows` a number k from which it follows for each grid;
    both None for the paper's (see `amm_matrix`). With `amm_in_training` the model is trained with its AMM, which
    otherwise acts in evaluation alone.

    `objective` is what the model was trained to predict, a name of `edt_core.diffusion.objectives`; `outputs` is the
    number of tensors of the latents' shape that the objective needs. `with_objective` sets both. A model that was
    trained on raw latents as (raw - latents_mean) / latents_std, by channel, has these two; otherwise they are None,
    and the scale is that of the autoencoder's configuration (see `edt_core.data.scale`). `quantization` is None for a
    model in float, as every training has it.

    Raises:
        ValueError: the values do not define a model; the message says which ones, and what is expected.
    """

    architecture: ClassVar[str]
    mask_form: ClassVar[MaskForm | None] = None
    only_objective: ClassVar[str | None] = None

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
    objective: str = "epsilon"
    outputs: int = 2
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    amm_radius_rows: int | None = None
    amm_in_training: bool = False
    quantization: Quantization | None = None

    def __init_subclass__(cls) -> None:
        """Register a family's configuration by its architecture."""
        super().__init_subclass__()
        if "architecture" in cls.__dict__:
            _ARCHITECTURES[cls.architecture] = cls

    def __post_init__(self) -> None:
        """Check the values."""
        if self.num_classes < 1:
            raise ValueError(f"{self.name}: num_classes is {self.num_classes}; it must be at least 1.")
        if self.outputs < 1:
            raise ValueError(f"{self.name}: outputs is {self.outputs}; it must be at least 1.")
        _check_latent_size(self)
        _check_statistics(self)
        _check_amm(self)

    def check_latents(self, counts: Mapping[str, Any]) -> None:  # noqa: B027  most families take any latents
        """Raise UserError for a latents artifact with these counts that the model cannot be trained on."""

    @property
    def image_size(self) -> int:
        """Side of the decoded images in pixels."""
        return self.latent_size * self.autoencoder_factor

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.outputs * self.in_channels

    @property
    def grid(self) -> int:
        """Side of the square of tokens that the latents are divided into."""
        return self.latent_size // self.patch_size

    @property
    @abstractmethod
    def cond_dim(self) -> int:
        """Width of the conditioning vector, equal to that of the first tokens."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Number of blocks in the forward pass."""

    @property
    def num_merges(self) -> int:
        """Number of times the grid is halved."""
        return 0

    @property
    def amm_presets(self) -> Mapping[str, tuple[int, ...]]:
        """Placements of AMM by what they are, beside those that are published."""
        return {"every_block": tuple(range(self.num_blocks))}

    @property
    def mask_sites(self) -> tuple[MaskSite, ...]:
        """The masking sites in forward order."""
        return ()

    @property
    def is_masked(self) -> bool:
        """Whether the model has a masked forward pass for training."""
        return self.mask_form is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which turns tuples into lists; `from_dict` turns them back.

        Fields that were added later are left out at their defaults, so that stored configurations stay equal.
        """
        left_out = {field.name for field in fields(self) if field.name in _ADDED and _is_default(self, field)}
        values = {name: value for name, value in asdict(self).items() if name not in left_out}
        return {"architecture": self.architecture, **values}

    def with_width(self, width: int) -> Self:
        """The same model with first tokens of another width; all widths keep their ratio, and heads keep their width.

        Raises ValueError if there is no such model.
        """
        raise ValueError(f"{self.name}: models of this family have one width; leave train.width out.")

    def objective_record(self) -> dict[str, str]:
        """`{"objective": its name}` for a model's records; empty for epsilon, since older records have no objective."""
        return {} if self.objective == "epsilon" else {"objective": self.objective}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`, also for values read from JSON. Old values without an architecture are of an EDT.

        Raises:
            ValueError: unknown keys, missing keys, or invalid values.
        """
        settings = dict(values)
        architecture = settings.pop("architecture", _FIRST_ARCHITECTURE)
        if architecture not in _ARCHITECTURES:
            raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(sorted(_ARCHITECTURES))}")
        config_class = _ARCHITECTURES[architecture]
        by_name = {field.name: field for field in fields(config_class)}
        unknown = sorted(set(settings) - set(by_name))
        missing = sorted(name for name, field in by_name.items() if field.default is MISSING and name not in settings)
        if unknown or missing:
            raise ValueError(
                f"This is not a {config_class.__name__}: unknown keys {unknown}, missing keys {missing}. "
                f"Known keys are {sorted(by_name)}."
            )
        if "quantization" in settings:
            settings["quantization"] = Quantization.of(settings["quantization"])
        return config_class(**{key: _as_tuple(value) for key, value in settings.items()})


@dataclass(frozen=True, kw_only=True)
class OneWidthConfig(ModelConfig):
    """`depth` blocks of width `dim` on one grid."""

    depth: int
    dim: int
    num_heads: int

    def __post_init__(self) -> None:
        """Check the values."""
        check_width(self.name, self.dim, self.num_heads)
        if self.depth < 1:
            raise ValueError(f"{self.name}: depth is {self.depth}; it must be at least 1.")
        super().__post_init__()

    @property
    def cond_dim(self) -> int:
        """Width of the conditioning vector, equal to that of the tokens."""
        return self.dim

    @property
    def num_blocks(self) -> int:
        """Number of blocks in the forward pass."""
        return self.depth

    def with_width(self, width: int) -> Self:
        """The same model with `width // (dim // num_heads)` heads."""
        head = self.dim // self.num_heads
        check_multiple(self.name, width, math.lcm(head, 4), (head,))
        return replace(self, dim=width, num_heads=width // head)


def _is_default(config: ModelConfig, field: Field[Any]) -> bool:
    return bool(getattr(config, field.name) == field.default)


def _as_tuple(value: Any) -> Any:
    """Lists to tuples, at any depth."""
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value


def check_width(name: str, dim: int, heads: int) -> None:
    """Raise ValueError unless the width is divisible by the heads, and by 4 for the position embedding."""
    if dim < 1 or heads < 1 or dim % heads or dim % 4:
        raise ValueError(
            f"{name}: blocks of width {dim} with {heads} heads; the width must be a multiple of "
            "the number of heads, and of 4 for the sine-cosine position embedding."
        )


def check_multiple(name: str, width: int, unit: int, heads: Sequence[int]) -> None:
    """Raise ValueError unless a width is a multiple of `unit`, so that heads keep their widths."""
    if width < 1 or width % unit:
        widths = ", ".join(map(str, dict.fromkeys(heads)))
        raise ValueError(
            f"{name}: the width is {width}; use a multiple of {unit}, so that heads keep their width of {widths}, and "
            "the widths of stages their ratio."
        )


def _check_latent_size(config: ModelConfig) -> None:
    multiple = config.patch_size * 2**config.num_merges
    if config.latent_size < multiple or config.latent_size % multiple:
        merged = f" and merged {config.num_merges} times by 2" if config.num_merges else ""
        raise LatentSizeError(
            f"{config.name}: latents of {config.latent_size}x{config.latent_size} cannot be cut into "
            f"patches of {config.patch_size}{merged}. Use a multiple of "
            f"{multiple}, that is an image size that is a multiple of {multiple * config.autoencoder_factor}."
        )


def _check_statistics(config: ModelConfig) -> None:
    mean, std = config.latents_mean, config.latents_std
    if mean is None and std is None:
        return
    given = [*(mean or ()), *(std or ())]
    is_valid = all(isinstance(value, float) and math.isfinite(value) for value in given) and min(std or (0.0,)) > 0
    if not is_valid or len(mean or ()) != config.in_channels or len(std or ()) != config.in_channels:
        raise ValueError(
            f"{config.name}: latents_mean is {mean} and latents_std {std}; both need a finite number for each of the "
            f"{config.in_channels} channels, and the standard deviations must be above 0, or both are None."
        )


def _check_amm(config: ModelConfig) -> None:
    check_amm_blocks(config, config.amm_blocks)
    if config.amm_kernel not in AMM_KERNELS:
        raise UserError(f"{config.name}: unknown amm_kernel {config.amm_kernel!r}. Known: {', '.join(AMM_KERNELS)}.")
    if config.amm_radius is not None and not 0.0 < config.amm_radius < math.inf:
        raise UserError(
            f"{config.name}: amm_radius is {config.amm_radius} tokens; it must be above 0, or None for the paper's."
        )
    if config.amm_radius_rows is None:
        return
    if config.amm_radius_rows < 0:
        raise UserError(
            f"{config.name}: amm_radius_rows is {config.amm_radius_rows}; it must be at least 0, or None for the "
            "paper's 4."
        )
    if config.amm_radius is not None:
        raise UserError(
            f"{config.name}: amm_radius is {config.amm_radius} and amm_radius_rows {config.amm_radius_rows}; both set "
            "the radius: leave one of them out."
        )


def check_amm_blocks(config: ModelConfig, blocks: Sequence[int]) -> None:
    """Raise UserError unless every index in `blocks` is that of a block of the model."""
    outside = [block for block in blocks if not 0 <= block < config.num_blocks]
    if outside:
        raise UserError(
            f"{config.name}: amm_blocks {outside} do not exist. The model has {config.num_blocks} blocks; "
            f"use indices 0..{config.num_blocks - 1}."
        )


def check_ratios(name: str, ranges: Sequence[RatioRange]) -> None:
    """Raise ValueError unless all ranges of mask ratios are within 0..1 (1 excluded)."""
    for low, high in ranges:
        if not 0.0 <= low <= high < 1.0:
            raise ValueError(f"{name}: mask ratios {low}..{high} are not a range within 0..1 (1 excluded).")

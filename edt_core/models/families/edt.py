"""EDT, the Efficient Diffusion Transformer (arXiv 2410.23788): an hourglass of DiT blocks over latents.

Legend: N = batch, C = latent channels, h = side of the latents, T = tokens of the current stage or site.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from edt_core.models.attention import Attention, Block, RelativePositionBias
from edt_core.models.config import ModelConfig, check_multiple, check_ratios, check_width
from edt_core.models.families.adaln import AdaLNTransformer
from edt_core.models.families.amm_placements import ANY_SCALE, AmmPlacement
from edt_core.models.families.depth import Depth, Runs
from edt_core.models.families.family import Family, ModelSize
from edt_core.models.layers import DownSample, FinalLayer, SkipConnection, UpSample, patches_to_image
from edt_core.models.mask_form import MaskForm, MaskSite, RatioRange
from edt_core.models.masking import check_masks
from edt_core.models.positions import sincos_position_embedding

_INPUT = "x_embedder"  # the site before all blocks


class KeptFlags(MaskForm):
    """Boolean masks [N, T], True for an unmasked token: its uniform number is at least the ratio."""

    dtype = torch.bool
    described = "boolean masks of"

    def draw(self, uniform: Tensor, ratio: Tensor) -> Tensor:
        """Flags of the unmasked tokens."""
        return uniform >= ratio

    def columns(self, tokens: int, ratio: float) -> int:
        """All tokens: a masked token is zeroed, not removed."""
        return tokens

    def fits(self, columns: int, tokens: int) -> bool:
        """Whether there is one flag per token."""
        return columns == tokens


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

    `dims`, `num_heads` and `depths` have one entry per stage. The number of stages is odd: each stage before the middle
    one ends with a module that halves the grid, each stage after it starts by doubling the grid. `down_mask_ratios` has
    a range of mask ratios for each down-sampling module, or none at all; `mid_mask_block`, if not None, is the block of
    the first stage whose input is masked too, with a ratio from `mid_mask_ratio` (a ratio is the share of masked
    tokens, in 0..1). With `input_mask_ratio` tokens are masked before the model, as MDT masks them: the long skips do
    not have them either.

    Without `token_enhancement` or `position_supplement` the down-sampling modules lack their adaptive norm or their
    position embedding, for the ablation of the paper's table 4.
    """

    architecture: ClassVar[str] = "edt"
    mask_form: ClassVar[MaskForm | None] = KeptFlags()

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    num_heads: tuple[int, ...]
    down_mask_ratios: tuple[RatioRange, ...] = ((0.4, 0.5), (0.1, 0.2))
    mid_mask_block: int | None = None
    mid_mask_ratio: RatioRange = (0.15, 0.25)
    token_enhancement: bool = True
    position_supplement: bool = True
    input_mask_ratio: RatioRange | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        _check_hourglass(self)
        super().__post_init__()
        _check_masks(self)

    @property
    def cond_dim(self) -> int:
        """Width of the conditioning vector, equal to that of the first stage."""
        return self.dims[0]

    @property
    def num_blocks(self) -> int:
        """Number of blocks in all stages."""
        return sum(self.depths)

    def with_width(self, width: int) -> Self:
        """The same hourglass with a first stage of another width; the widths of all stages keep their ratio."""
        heads = [dim // number for dim, number in zip(self.dims, self.num_heads, strict=True)]
        check_multiple(self.name, width, math.lcm(self.dims[0] // math.gcd(*self.dims, *self.num_heads), 4), heads)
        return replace(
            self,
            dims=tuple(dim * width // self.dims[0] for dim in self.dims),
            num_heads=tuple(number * width // self.dims[0] for number in self.num_heads),
        )

    @property
    def num_merges(self) -> int:
        """Number of times the hourglass halves its grid."""
        return len(self.depths) // 2

    @property
    def mask_sites(self) -> tuple[MaskSite, ...]:
        """The embedding and a block of the first stage, if any, then the down-sampling modules."""
        sites = []
        if self.input_mask_ratio is not None:
            sites.append(MaskSite(_INPUT, self.grid**2, self.input_mask_ratio))
        if self.mid_mask_block is not None:
            sites.append(MaskSite(f"blocks.{self.mid_mask_block}", self.grid**2, self.mid_mask_ratio))
        for index, ratio_range in enumerate(self.down_mask_ratios):
            sites.append(MaskSite(f"down_blocks.{index}", self.stages[index].grid ** 2, ratio_range))
        return tuple(sites)

    @property
    def amm_presets(self) -> Mapping[str, tuple[int, ...]]:
        """All blocks that halve the grid and the middle stage's (encoder), those after it (decoder), or of the latter
        every second one of a stage, so that global and local attention alternate."""
        down, up = self.stages[: self.num_merges + 1], self.stages[self.num_merges + 1 :]
        return {
            **super().amm_presets,
            "encoder": tuple(block for stage in down for block in stage.blocks),
            "decoder": tuple(block for stage in up for block in stage.blocks),
            "alternating": tuple(block for stage in up for block in stage.blocks[1::2]),
        }

    @property
    def is_masked(self) -> bool:
        """Whether any site masks tokens."""
        return bool(self.mask_sites)

    @property
    def stages(self) -> tuple[StageSpec, ...]:
        """The stages in forward order."""
        last = len(self.depths) - 1
        return tuple(
            StageSpec(depth, dim, heads, self.grid >> min(i, last - i), sum(self.depths[:i]))
            for i, (depth, dim, heads) in enumerate(zip(self.depths, self.dims, self.num_heads, strict=True))
        )


class EDT(AdaLNTransformer):
    """Three stages that merge tokens, two that split them, long skips between; see `DiffusionTransformer`.

    Its masks: one boolean [M, T] per masking site in forward order (see `mask_sites`), True for an unmasked token.
    """

    config: EDTConfig
    pos_embed: Tensor

    def __init__(self, config: EDTConfig) -> None:
        super().__init__(config)
        stages, cond_dim = config.stages, config.cond_dim
        middle = config.num_merges
        self.down_stages = stages[:middle]
        self.middle_stage = stages[middle]
        self.up_stages = stages[middle + 1 :]

        self.register_buffer("pos_embed", sincos_position_embedding(cond_dim, stages[0].grid))
        self.blocks = nn.ModuleList(_block(stage, config) for stage in stages for _ in stage.blocks)
        self.down_blocks = nn.ModuleList(
            DownSample(
                *(stage.dim, next_stage.dim, stage.grid, cond_dim),
                enhanced=config.token_enhancement,
                supplemented=config.position_supplement,
            )
            for stage, next_stage in zip(self.down_stages, stages[1 : middle + 1], strict=True)
        )
        self.up_blocks = nn.ModuleList(
            UpSample(previous.dim, stage.dim, previous.grid)
            for previous, stage in zip(stages[middle:-1], self.up_stages, strict=True)
        )
        self.concat_blocks = nn.ModuleList(SkipConnection(stage.dim, stage.grid, cond_dim) for stage in self.up_stages)
        self.final_layer = FinalLayer(stages[-1].dim, config.patch_size**2 * config.out_channels, cond_dim)
        self.finish()

    def forward(self, x: Tensor, t: Tensor, y: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Noise and variance [N, 2C, h, h] of latents x [N, C, h, h] at timesteps t [N] for labels y [N]."""
        self.check_inputs(x, t, y)
        keeps = self._assign_masks(masks, x.shape[0])
        x = self._without_masked(self.x_embedder(x) + self.pos_embed, keeps.get(_INPUT))
        c = self.t_embedder(t) + self.y_embedder(y)

        skips = []
        for index, (stage, down) in enumerate(zip(self.down_stages, self.down_blocks, strict=True)):
            skips.append(x)
            x = self._run_stage(stage, x, c, keeps)
            x = down(x, c, keeps.get(f"down_blocks.{index}"))
        x = self._run_stage(self.middle_stage, x, c, keeps)
        for stage, up, skip in zip(self.up_stages, self.up_blocks, self.concat_blocks, strict=True):
            x = skip(up(x), skips.pop(), c)
            x = self._run_stage(stage, x, c, keeps)

        return patches_to_image(self.final_layer(x, c), self.up_stages[-1].grid, self.config.patch_size)

    def place(self, module: str) -> str:
        """The stage that a module belongs to. A down-sampling module belongs to the stage before it."""
        group, _, rest = module.partition(".")
        if not rest[:1].isdigit():
            return super().place(module)
        number = int(rest.partition(".")[0])
        if group == "blocks":
            number = next(i for i, stage in enumerate(self.config.stages) if number in stage.blocks)
        elif group != "down_blocks":
            number += self.config.num_merges + 1
        grid = self.config.stages[number].grid
        return f"stage {number} ({grid}x{grid})"

    def _run_stage(self, stage: StageSpec, x: Tensor, c: Tensor, keeps: Mapping[str, Tensor]) -> Tensor:
        """Run one stage's blocks; before a masking block, a masked token is replaced by its position embedding."""
        for index in stage.blocks:
            x = self.run_block(self.blocks[index], self._without_masked(x, keeps.get(f"blocks.{index}")), c)
        return x

    def _without_masked(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Tokens x [N, T, D] of the first grid, of a masked one (keep [N, T] False) only its position embedding."""
        return x if keep is None else self.pos_embed.where(~keep.unsqueeze(-1), x)

    def _assign_masks(self, masks: Sequence[Tensor] | None, batch_size: int) -> Mapping[str, Tensor]:
        """The masks of all rows by the module that they mask the input of, of masks in forward order."""
        if masks is None:
            return {}
        check_masks(self.config, masks, batch_size)
        whole = [torch.cat([mask.new_ones(batch_size - len(mask), mask.shape[1]), mask]) for mask in masks]
        return {site.module: mask for site, mask in zip(self.config.mask_sites, whole, strict=True)}


def _block(stage: StageSpec, config: EDTConfig) -> Block:
    bias = RelativePositionBias(stage.grid, stage.num_heads)
    return Block(Attention(stage.dim, stage.num_heads, stage.grid, bias), config.cond_dim, config.mlp_ratio)


def _check_hourglass(config: EDTConfig) -> None:
    lengths = {len(config.depths), len(config.dims), len(config.num_heads)}
    if len(lengths) != 1 or len(config.depths) % 2 == 0 or len(config.depths) < 3:
        raise ValueError(
            f"{config.name}: depths {config.depths}, dims {config.dims} and num_heads {config.num_heads} "
            "must have the same odd number of entries, one per stage, 3 or more."
        )
    if config.dims != config.dims[::-1]:
        raise ValueError(
            f"{config.name}: dims {config.dims} must be the same from both ends, since a long skip "
            "joins the stages that mirror each other."
        )
    for dim, heads in zip(config.dims, config.num_heads, strict=True):
        check_width(config.name, dim, heads)


def _check_masks(config: EDTConfig) -> None:
    if len(config.down_mask_ratios) not in (0, config.num_merges):
        raise ValueError(
            f"{config.name}: {len(config.down_mask_ratios)} ranges in down_mask_ratios for "
            f"{config.num_merges} down-sampling modules; set one range for each, or none at all."
        )
    at_input = [] if config.input_mask_ratio is None else [config.input_mask_ratio]
    check_ratios(config.name, [*config.down_mask_ratios, config.mid_mask_ratio, *at_input])
    if config.mid_mask_block is not None and not 0 <= config.mid_mask_block < config.depths[0]:
        raise ValueError(
            f"{config.name}: mid_mask_block is {config.mid_mask_block}, but a masked token is replaced by "
            "the first stage's position embedding, so it must be one of that stage's blocks "
            f"0..{config.depths[0] - 1}."
        )


# The files of github.com/xinwangChen/EDT have these settings in comments. EDT-S and -B share them: [7, 10] "when cfg=1,
# cfg=1.25 or cfg=1.5", [8] "when cfg=2 or cfg>=3"; scales between 1.5 and 2 count as 1.5. The comment on 512 px names
# only EDT-S, but the file states that S and B have the same arrangement. For XL no scale is named. The file has a
# second line for XL, with block 24 only and without a condition; it is not used here.
_FILE = "models_edt.py"
_PLACEMENTS = (
    *(
        placement
        for model in ("EDT-S/2", "EDT-B/2")
        for placement in (
            AmmPlacement(model, (8,), (2.0, math.inf), _FILE),
            AmmPlacement(model, (7, 10), (1.0, 2.0), _FILE),
            AmmPlacement(model, (10,), ANY_SCALE, _FILE, large=True),
        )
    ),
    AmmPlacement("EDT-XL/2", (23, 25), ANY_SCALE, _FILE),
)


class _Depth(Depth):
    """The blocks of each stage: down-sampling and up-sampling modules stay."""

    field = "depths"

    def runs(self, config: Any) -> Runs:
        """The stages."""
        return tuple(tuple((f"blocks.{index}",) for index in stage.blocks) for stage in config.stages)

    def fields(self, config: Any, counts: Sequence[int]) -> dict[str, Any]:
        """The depths; tokens are masked before a block at the same share of the first stage."""
        masked = config.mid_mask_block
        moved = None if masked is None else masked * counts[0] // config.depths[0]
        return {"depths": tuple(counts), "mid_mask_block": moved}


EDT_FAMILY = Family(
    title="EDT",
    long_name="Efficient Diffusion Transformer",
    paper="arXiv 2410.23788",
    config=EDTConfig,
    model=EDT,
    sizes={
        "EDT-S/2": ModelSize(
            {"depths": (2, 2, 2, 3, 3), "dims": (312, 416, 520, 416, 312), "num_heads": (6, 8, 10, 8, 6)}
        ),
        "EDT-B/2": ModelSize(
            {"depths": (2, 2, 2, 3, 3), "dims": (624, 832, 1040, 832, 624), "num_heads": (12, 16, 20, 16, 12)}
        ),
        "EDT-XL/2": ModelSize(
            {
                "depths": (6, 4, 4, 7, 7),
                "dims": (936, 1248, 1560, 1248, 936),
                "num_heads": (18, 24, 30, 24, 18),
                "mid_mask_block": 4,
            }
        ),
        "EDT-Tiny/2": ModelSize(
            {"depths": (2, 1, 1, 1, 2), "dims": (64, 80, 96, 80, 64), "num_heads": (4, 5, 6, 5, 4)},
            autoencoder_factor=4,
        ),
    },
    amm_placements=_PLACEMENTS,
    released_sampling={"amm_blocks": "paper"},
    overridable=(
        *("depths", "token_enhancement", "position_supplement"),
        *("input_mask_ratio", "down_mask_ratios", "mid_mask_block", "mid_mask_ratio"),
    ),
    depth=_Depth(),
)

"""MDTv2, the Masked Diffusion Transformer (arXiv 2303.14389, version 2): an encoder with long skips, and a decoder.

In the masked pass of training the encoder processes some of the tokens, and the side-interpolater, a separate block,
fills in the others before the decoder. Sampling does not use it.

Legend: N = batch, M = masked rows of it, C = latent channels, h = side of the latents, n = grid side, T = n² tokens,
k = unmasked tokens, D = width, K = width of the conditioning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edt_core.models.attention import Attention, Block, RelativePositionBias
from edt_core.models.config import OneWidthConfig, check_ratios
from edt_core.models.families.adaln import AdaLNTransformer
from edt_core.models.families.amm_placements import AmmPlacement
from edt_core.models.families.depth import Depth, Runs, joined_pairs
from edt_core.models.families.dit import DIT_WIDTHS
from edt_core.models.families.family import Family, ReleasedFormat, one_width
from edt_core.models.kernels import TokenLinear
from edt_core.models.layers import FinalLayer, patches_to_image
from edt_core.models.mask_form import MaskForm, MaskSite, RatioRange
from edt_core.models.masking import check_masks
from edt_core.models.positions import sincos_position_embedding

_SPARE_ROWS = 3  # of the bias table, for pairs with a class token, which these models do not have


class KeptIndices(MaskForm):
    """Indices int64 [N, k] of the unmasked tokens in ascending order, the same number in every row."""

    dtype = torch.int64
    described = "int64 masks of at most"

    def draw(self, uniform: Tensor, ratio: Tensor) -> Tensor:
        """Indices of the smallest numbers of each row."""
        count = max(1, self.columns(uniform.shape[1], float(ratio)))
        return uniform.argsort(dim=1)[:, :count].sort(dim=1).values

    def columns(self, tokens: int, ratio: float) -> int:
        """Number of unmasked tokens."""
        return int(tokens * (1 - ratio))

    def fits(self, columns: int, tokens: int) -> bool:
        """Whether there are at most as many indices as tokens."""
        return columns <= tokens


@dataclass(frozen=True, kw_only=True)
class MDTv2Config(OneWidthConfig):
    """A DiT split into an encoder, with skips from its first half to its second, and a decoder (arXiv 2303.14389).

    The last `decode_depth` of the `depth` blocks are the decoder's; 4 is the default of the authors' code. In the
    masked pass of training a share of tokens from the range `mask_ratio` is removed before the encoder.
    """

    architecture: ClassVar[str] = "mdtv2"
    mask_form: ClassVar[MaskForm | None] = KeptIndices()

    decode_depth: int = 4
    mask_ratio: RatioRange = (0.3, 0.5)

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        encoder = self.depth - self.decode_depth
        if self.decode_depth < 1 or encoder < 2 or encoder % 2:
            raise ValueError(
                f"{self.name}: {self.depth} blocks with a decoder of {self.decode_depth} leave {encoder} for the "
                "encoder, whose first half is joined to its second: leave an even number, at least 2."
            )
        check_ratios(self.name, [self.mask_ratio])

    @property
    def amm_presets(self) -> Mapping[str, tuple[int, ...]]:
        """All blocks, those of the encoder, and those of the decoder."""
        blocks = tuple(range(self.depth))
        first = self.depth - self.decode_depth
        return {**super().amm_presets, "encoder": blocks[:first], "decoder": blocks[first:]}

    @property
    def mask_sites(self) -> tuple[MaskSite, ...]:
        """The encoder's input: it runs on the unmasked tokens."""
        return (MaskSite("en_inblocks.0", self.grid**2, self.mask_ratio),)


class TableAndIndex(RelativePositionBias):
    """The bias in the form of published checkpoints: with spare rows, and the index [T, T] of all pairs."""

    relative_position_index: Tensor

    def __init__(self, grid: int, num_heads: int) -> None:
        super().__init__(grid, num_heads)
        self.relative_position_bias_table = nn.Parameter(torch.empty(self.span**2 + _SPARE_ROWS, num_heads))
        self.register_buffer("relative_position_index", self.pairs(torch.arange(grid**2)).long())


class SkipBlock(Block):
    """A block whose input is joined with that of a long skip."""

    def __init__(self, attention: Attention, cond_dim: int, mlp_ratio: float) -> None:
        super().__init__(attention, cond_dim, mlp_ratio)
        dim = attention.proj.in_features
        self.skip_linear = TokenLinear(2 * dim, dim)

    def forward(self, x: Tensor, c: Tensor, indices: Tensor | None, skip: Tensor) -> Tensor:  # type: ignore[override]
        """Join and mix: x and skip [N, T, D], c [N, K] -> [N, T, D]."""
        return super().forward(self.skip_linear(torch.cat([x, skip], dim=-1)), c, indices)


class MDTv2(AdaLNTransformer):
    """See `DiffusionTransformer`. Its mask: the indices of the unmasked tokens, int64 [M, k]."""

    config: MDTv2Config

    def __init__(self, config: MDTv2Config) -> None:
        super().__init__(config)
        half = (config.depth - config.decode_depth) // 2
        self.pos_embed = nn.Parameter(sincos_position_embedding(config.dim, config.grid))  # trained, unlike DiT's
        self.en_inblocks = nn.ModuleList(_block(config, Block) for _ in range(half))
        self.en_outblocks = nn.ModuleList(_block(config, SkipBlock) for _ in range(half))
        self.de_blocks = nn.ModuleList(_block(config, SkipBlock) for _ in range(config.decode_depth))
        self.sideblocks = nn.ModuleList([_block(config, Block)])
        self.final_layer = FinalLayer(config.dim, config.patch_size**2 * config.out_channels, config.dim)
        self.decoder_pos_embed = nn.Parameter(sincos_position_embedding(config.dim, config.grid))
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.finish()

    def initialize_weights(self) -> None:
        """DiT's initialisation, and a small random mask token."""
        super().initialize_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def masking_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the side-interpolater, and the mask token."""
        yield from self.sideblocks.parameters()
        yield self.mask_token

    def forward(self, x: Tensor, t: Tensor, y: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Noise and variance [N, 2C, h, h] of latents x [N, C, h, h] at timesteps t [N] for labels y [N]."""
        self.check_inputs(x, t, y)
        image = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        if masks is None:
            x = self._encode(image, c) + self.decoder_pos_embed
        else:
            check_masks(self.config, masks, x.shape[0])
            x = self._encode_masked(image, c, masks[0])
        for block in self.de_blocks:
            x = self.run_block(block, x, c, None, image)
        return patches_to_image(self.final_layer(x, c), self.config.grid, self.config.patch_size)

    def place(self, module: str) -> str:
        """Encoder or decoder; "ends" for the embeddings and the last layer."""
        group = module.partition(".")[0]
        return {"en_inblocks": "encoder", "en_outblocks": "encoder", "de_blocks": "decoder"}.get(group, "ends")

    def _encode_masked(self, image: Tensor, c: Tensor, indices: Tensor) -> Tensor:
        """The decoder's input [N, T, D]; the last M rows are encoded from the tokens at `indices`, int64 [M, k]."""
        whole = len(image) - len(indices)
        columns = indices.unsqueeze(-1).expand(-1, -1, image.shape[-1])
        encoded = self._encode(image[whole:].gather(1, columns), c[whole:], indices)
        masked = self._interpolate(encoded, c[whole:], columns)
        if whole == 0:
            return masked
        return torch.cat([self._encode(image[:whole], c[:whole]) + self.decoder_pos_embed, masked])

    def _encode(self, x: Tensor, c: Tensor, indices: Tensor | None = None) -> Tensor:
        """Run the encoder on all tokens, or on the unmasked ones: [N, k, D] -> [N, k, D]."""
        skips = []
        for block in self.en_inblocks:
            x = self.run_block(block, x, c, indices)
            skips.append(x)
        for block in self.en_outblocks:
            x = self.run_block(block, x, c, indices, skips.pop())
        return x

    def _interpolate(self, x: Tensor, c: Tensor, indices: Tensor) -> Tensor:
        """All tokens [M, T, D] from the unmasked ones, x [M, k, D], whose positions are `indices` [M, k, D].

        The side-interpolater gets the mask token in place of masked tokens; its output replaces only those.
        """
        size = (x.shape[0], self.decoder_pos_embed.shape[1], x.shape[-1])
        filled = self.mask_token.to(x.dtype).expand(size).scatter(1, indices, x) + self.decoder_pos_embed
        is_unmasked = torch.zeros(size, dtype=torch.bool, device=x.device).scatter(1, indices, True)
        (side,) = self.sideblocks
        return torch.where(is_unmasked, filled, self.run_block(side, filled, c))


def _block(config: MDTv2Config, kind: type[Block]) -> Block:
    bias = TableAndIndex(config.grid, config.num_heads)
    return kind(Attention(config.dim, config.num_heads, config.grid, bias), config.dim, config.mlp_ratio)


class _Format(ReleasedFormat):
    """Files of the authors' code, in which the decoder's depth is an option and the index of all pairs is stored."""

    derived = ".relative_position_index"

    def numbers(self, state: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """The number of decoder blocks in the keys."""
        blocks = {key.split(".")[1] for key in state if key.startswith("de_blocks.")}
        return {"decode_depth": len(blocks)} if blocks else {}


class _Depth(Depth):
    """Pairs of encoder blocks that a long skip joins, and the blocks of the decoder."""

    field = "depth"

    def runs(self, config: Any) -> Runs:
        """The encoder's pairs, then the decoder's blocks."""
        pairs = joined_pairs("en_inblocks", "en_outblocks", (config.depth - config.decode_depth) // 2)
        return pairs, tuple((f"de_blocks.{index}",) for index in range(config.decode_depth))

    def fields(self, config: Any, counts: Sequence[int]) -> dict[str, Any]:
        """Both depths."""
        pairs, decoder = counts
        return {"depth": 2 * pairs + decoder, "decode_depth": decoder}


# Blocks of the decoder. The configurations of github.com/sail-sg/MDT do not set the number: it is an option of
# training, 6 in the authors' command for S and 4 in the one for XL. For B and L their code has no number, so the
# option's default, 4, is used.
_DECODE_DEPTHS = {"S": 6, "B": 4, "L": 4, "XL": 4}

MDTV2_FAMILY = Family(
    title="MDTv2",
    long_name="Masked Diffusion Transformer, version 2",
    paper="arXiv 2303.14389",
    config=MDTv2Config,
    model=MDTv2,
    sizes={
        **{
            f"MDTv2-{size}/2": one_width(width, decode_depth=_DECODE_DEPTHS[size]) for size, width in DIT_WIDTHS.items()
        },
        "MDTv2-Tiny/2": one_width((6, 56, 4), autoencoder_factor=4, decode_depth=2),
    },
    amm_placements=(  # 400k steps, "when cfg=1 or cfg=3.8" (power-cosine); none for 512 px
        AmmPlacement("MDTv2-S/2", (8,), (1.0, 3.8), "other_models/models_mdt_with_amm.py"),
    ),
    released=_Format(),
    released_sampling={"amm_blocks": "model", "cfg_power": 4.0},
    overridable=("mask_ratio", "depth", "decode_depth"),
    depth=_Depth(),
)

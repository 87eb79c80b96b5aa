"""Masks of training: where tokens are masked, and how masks are drawn.

EDT masks inside its down-sampling modules, where all tokens have been mixed before (token relation-enhanced masking,
arXiv 2410.23788); MDTv2 takes tokens away before its encoder (arXiv 2303.14389). DiT has no masks.

Legend: N = batch, T = tokens at a site. EDT's mask is boolean [N, T], True where the token is kept; MDTv2's holds the
indices of the k tokens that are kept, int64 [N, k] in rising order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edt_core.errors import UserError
from edt_core.models.config import EDTConfig, MDTv2Config, ModelConfig, RatioRange


@dataclass(frozen=True)
class MaskSite:
    """A place in the forward pass that masks tokens.

    `module` is the name of the module that masks its input, as in `named_modules()`; `ratio_range` bounds the
    share of its `tokens` that is taken away.
    """

    module: str
    tokens: int
    ratio_range: RatioRange


def mask_sites(config: ModelConfig) -> tuple[MaskSite, ...]:
    """The masking sites in forward order: the block of the first stage, if any, then the down modules."""
    if isinstance(config, MDTv2Config):
        return (MaskSite("en_inblocks.0", config.grid**2, config.mask_ratio),)
    if not isinstance(config, EDTConfig):
        return ()
    sites = []
    if config.mid_mask_block is not None:
        sites.append(MaskSite(f"blocks.{config.mid_mask_block}", config.stages[0].grid ** 2, config.mid_mask_ratio))
    for index, ratio_range in enumerate(config.down_mask_ratios):
        sites.append(MaskSite(f"down_blocks.{index}", config.stages[index].grid ** 2, ratio_range))
    return tuple(sites)


def draw_mask_ratios(config: ModelConfig, generator: torch.Generator) -> Tensor:
    """One mask ratio per site, uniform in the site's range: [sites] float32 on the generator's device."""
    if not config.is_masked:
        return torch.zeros(0, device=generator.device)
    low, high = torch.tensor([site.ratio_range for site in mask_sites(config)], device=generator.device).unbind(1)
    return low + (high - low) * torch.rand(len(low), generator=generator, device=generator.device)


def draw_masks(
    config: ModelConfig,
    batch_size: int,
    generator: torch.Generator,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Masks for one forward pass, one per site in forward order.

    A ratio is drawn per site. EDT keeps a token where its uniform number is at least the ratio, MDTv2 the same number
    of tokens in every row, those of the least uniform numbers. Nothing depends on the number of ranks: draw for the
    global batch, then take each rank's rows with `slice_masks`.

    Args:
        config: the model's configuration.
        batch_size: N, the global batch where ranks share one.
        generator: source of all randomness; seed it with (seed, step).
        device: where the masks go; the generator's device if None.
    """
    ratios = draw_mask_ratios(config, generator)
    masks = []
    for site, ratio in zip(mask_sites(config), ratios, strict=True):
        uniform = torch.rand(batch_size, site.tokens, generator=generator, device=generator.device)
        mask = _least(uniform, float(ratio)) if isinstance(config, MDTv2Config) else uniform >= ratio
        masks.append(mask.to(device or generator.device))
    return masks


def _least(uniform: Tensor, ratio: float) -> Tensor:
    """Indices of the least numbers of each row, a share 1 - ratio of them: [N, T] -> int64 [N, k]."""
    count = max(1, int(uniform.shape[1] * (1 - ratio)))
    return uniform.argsort(dim=1)[:, :count].sort(dim=1).values


def slice_masks(masks: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """One rank's (or one micro-batch's) rows of every mask."""
    return [mask[rows] for mask in masks]


def check_masks(config: ModelConfig, masks: Sequence[Tensor], batch_size: int) -> None:
    """Raise ValueError unless `masks` has a mask for each site, of one number of rows that the batch has."""
    sites, indices = mask_sites(config), isinstance(config, MDTv2Config)
    rows = len(masks[0]) if len(masks) else 0
    fits = len(masks) == len(sites) and rows <= batch_size
    for mask, site in zip(masks, sites, strict=False):
        columns = mask.shape[-1] <= site.tokens if indices else mask.shape[-1] == site.tokens
        fits &= mask.ndim == 2 and len(mask) == rows and columns
        fits &= mask.dtype == (torch.int64 if indices else torch.bool)
    if not fits:
        kind = "int64 masks of at most" if indices else "boolean masks of"
        raise ValueError(
            f"{config.name} takes {len(sites)} {kind} {[site.tokens for site in sites]} tokens for up to {batch_size} "
            f"rows, but got {[list(mask.shape) for mask in masks]} of {[str(mask.dtype) for mask in masks]}. "
            "Draw them with draw_masks(config, batch_size, generator)."
        )


def check_masked_loss(config: ModelConfig, masked_loss: bool) -> None:
    """Raise UserError where a masked loss is wanted of a model that has no masks."""
    if masked_loss and not config.is_masked:
        raise UserError(
            f"{config.name} has no masked pass, but masked_loss is true, which would count its loss twice; set it to "
            "false (train.masked_loss=false, or --masked-loss false)"
        )

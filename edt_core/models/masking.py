"""Token relation-enhanced masking (arXiv 2410.23788): where tokens are masked, and how masks are drawn.

Legend: N = batch, T = tokens at a site. A mask is boolean [N, T], True where the token is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edt_core.models.config import ModelConfig, RatioRange


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
    sites = []
    if config.mid_mask_block is not None:
        sites.append(MaskSite(f"blocks.{config.mid_mask_block}", config.stages[0].grid ** 2, config.mid_mask_ratio))
    for index, ratio_range in enumerate(config.down_mask_ratios):
        sites.append(MaskSite(f"down_blocks.{index}", config.stages[index].grid ** 2, ratio_range))
    return tuple(sites)


def draw_mask_ratios(config: ModelConfig, generator: torch.Generator) -> Tensor:
    """One mask ratio per site, uniform in the site's range: [sites] float32 on the generator's device."""
    low, high = torch.tensor([site.ratio_range for site in mask_sites(config)], device=generator.device).unbind(1)
    return low + (high - low) * torch.rand(len(low), generator=generator, device=generator.device)


def draw_masks(
    config: ModelConfig,
    batch_size: int,
    generator: torch.Generator,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Masks for one forward pass, one bool [N, T] per site in forward order.

    A ratio is drawn per site, then a token is kept where its uniform number is at least the ratio. Nothing
    depends on the number of ranks: draw for the global batch, then take each rank's rows with `slice_masks`.

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
        masks.append((uniform >= ratio).to(device or generator.device))
    return masks


def slice_masks(masks: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """One rank's (or one micro-batch's) rows of every mask."""
    return [mask[rows] for mask in masks]


def check_masks(config: ModelConfig, masks: Sequence[Tensor], batch_size: int) -> None:
    """Raise ValueError unless `masks` has, for each site, a boolean mask of the right shape."""
    expected = [[batch_size, site.tokens] for site in mask_sites(config)]
    found = [list(mask.shape) for mask in masks]
    if found != expected or any(mask.dtype != torch.bool for mask in masks):
        raise ValueError(
            f"{config.name} takes {len(expected)} boolean masks of shapes {expected}, but got shapes "
            f"{found} of {[str(mask.dtype) for mask in masks]}. Draw them with "
            "draw_masks(config, batch_size, generator)."
        )

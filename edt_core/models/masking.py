"""Masks of training: where tokens are masked, and how masks are drawn.

EDT masks inside its down-sampling modules, after blocks have mixed all tokens (token relation-enhanced masking,
arXiv 2410.23788); MDTv2 removes tokens before its encoder (arXiv 2303.14389). The content of a mask is defined by the
`mask_form` of a family's configuration.

Legend: N = batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edt_core.errors import UserError
from edt_core.models.config import ModelConfig
from edt_core.models.mask_form import MaskSite


def mask_sites(config: ModelConfig) -> tuple[MaskSite, ...]:
    """The masking sites in forward order; none for a family without masks."""
    return config.mask_sites


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

    A ratio is drawn per site, and a uniform number per token. A training draws both by itself, so that its masks do
    not depend on the number of ranks, and passes them to `masks_of`.

    Args:
        config: the model's configuration.
        batch_size: N.
        generator: source of all random numbers; seed it with (seed, step).
        device: the device of the masks; the generator's device if None.
    """
    if config.mask_form is None:
        return []
    ratios = draw_mask_ratios(config, generator)
    uniforms = [
        torch.rand(batch_size, site.tokens, generator=generator, device=generator.device) for site in mask_sites(config)
    ]
    return [mask.to(device or generator.device) for mask in masks_of(config, ratios, uniforms)]


def masks_of(config: ModelConfig, ratios: Tensor, uniforms: Sequence[Tensor]) -> list[Tensor]:
    """Masks, one per site, from ratios [sites] and uniform numbers [N, tokens] per site. A row depends on its own."""
    if config.mask_form is None:
        return []
    return [config.mask_form.draw(uniform, ratio) for uniform, ratio in zip(uniforms, ratios, strict=True)]


def slice_masks(masks: Sequence[Tensor], rows: slice) -> list[Tensor]:
    """One rank's (or one micro-batch's) rows of every mask."""
    return [mask[rows] for mask in masks]


def check_masks(config: ModelConfig, masks: Sequence[Tensor], batch_size: int) -> None:
    """Raise ValueError unless `masks` has a valid mask for each site, all of the same number of rows."""
    sites, form = mask_sites(config), config.mask_form
    if form is None:
        if len(masks):
            raise ValueError(
                f"{config.name} has no masked pass, but got {len(masks)} masks. Draw masks with draw_masks(config, "
                "batch_size, generator), which returns none for it."
            )
        return
    rows = len(masks[0]) if len(masks) else 0
    fits = len(masks) == len(sites) and rows <= batch_size
    for mask, site in zip(masks, sites, strict=False):
        fits &= mask.ndim == 2 and len(mask) == rows and form.fits(mask.shape[-1], site.tokens)
        fits &= mask.dtype == form.dtype
    if not fits:
        raise ValueError(
            f"{config.name} takes {len(sites)} {form.described} {[site.tokens for site in sites]} tokens for up to "
            f"{batch_size} rows, but got {[list(mask.shape) for mask in masks]} of "
            f"{[str(mask.dtype) for mask in masks]}. Draw them with draw_masks(config, batch_size, generator)."
        )


def check_masked_loss(config: ModelConfig, masked_loss: bool) -> None:
    """Raise UserError if a masked loss is set for a model without masks."""
    if masked_loss and not config.is_masked:
        raise UserError(
            f"{config.name} has no masked pass, but masked_loss is true, which would count its loss twice; set it to "
            "false (train.masked_loss=false, or --masked-loss false)"
        )

"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

from collections.abc import Callable

import torch
from torch import Tensor

from edt_core.diffusion.sampling import ModelFn
from edt_core.errors import UserError

ClassModel = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [N, C, H, W], t [N], y [N]) -> [N, 2C, H, W]


def guided(model: ClassModel, y: Tensor, null_label: int, cfg_scale: float, channels: int | None = 3) -> ModelFn:
    """The model bound to labels y, int64 [N], and pushed away from what it predicts without a label.

    The guided noise is eps_null + cfg_scale (eps_y - eps_null), which is eq. 6 of the paper with cfg_scale =
    1 + w. It replaces the first `channels` channels of the noise, or all of them where `channels` is None;
    the others, and the variance, are the conditional ones. Three is what published results of DiT and EDT
    use.
    Both halves go through the model in one call, the labelled half first. With cfg_scale 1 there is
    nothing to push: the model is called with y alone. Raises UserError for fewer than one channel, and when
    called for more channels than the latents have.
    """
    if channels is not None and channels < 1:
        raise UserError(f"guidance on {channels} channels does nothing. Use cfg_scale=1 for no guidance.")
    if cfg_scale == 1.0:
        return lambda x, t: model(x, t, y)
    labels = torch.cat([y, torch.full_like(y, null_label)])

    def model_fn(x: Tensor, t: Tensor) -> Tensor:
        count = x.shape[1] if channels is None else channels
        if count > x.shape[1]:
            raise UserError(
                f"guidance on {count} channels, but the latents have {x.shape[1]}. Use channels=None for all."
            )
        output = model(torch.cat([x, x]), torch.cat([t, t]), labels)
        conditional, unconditional = output.chunk(2)
        base = unconditional[:, :count]
        eps = base + cfg_scale * (conditional[:, :count] - base)
        return torch.cat([eps, conditional[:, count:]], dim=1)

    return model_fn

"""The image autoencoder: fit a small one, read a published one, and cross between pixels and latents.

Legend: N images, S image side in pixels, C latent channels, h latent side (S / downsample factor).
Three stages, each with its range: pixels uint8 0..255 -> images float32 -1..1 -> posterior (mean, std) of raw latents.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edt_core.config import AutoencoderConfig
from edt_core.data.images import to_model_range
from edt_core.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def build_autoencoder(config: AutoencoderConfig, image_size: int) -> "AutoencoderKL":
    """An unfitted AutoencoderKL: each level after the first halves the side and doubles the channels."""
    from diffusers import AutoencoderKL

    levels = config.downsample_factor.bit_length()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=config.latent_channels,
            block_out_channels=tuple(config.base_channels * 2**level for level in range(levels)),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=8,
            sample_size=image_size,
        )


def fit_autoencoder(
    config: AutoencoderConfig,
    pixels: NDArray[np.uint8],
    device: torch.device | str = "cpu",
    report: Callable[[int, float], None] = lambda step, mse: None,
) -> tuple["AutoencoderKL", dict[str, float]]:
    """Fit on uint8 [N, S, S, 3] by squared error and a small KL term (Rombach et al. 2022, without the adversary).

    Returns the autoencoder, its measured scaling factor in its config, and {"mse", "scaling_factor"}. Batches and
    posterior draws are functions of (seed, step).
    """
    model = build_autoencoder(config, pixels.shape[1]).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps, pct_start=0.1)
    mse = float("nan")
    for step in range(config.steps):
        batch = np.random.default_rng([config.seed, step]).integers(0, len(pixels), config.batch_size)
        images = torch.from_numpy(to_model_range(pixels[batch])).to(device)
        posterior = model.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(config.seed + step))
        decoded = model.decode(posterior.mean + posterior.std * noise.to(device)).sample
        error = (decoded - images).square().mean()
        loss = error + config.kl_weight * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        mse = float(error.detach())
        report(step + 1, mse)
    if not np.isfinite(mse):
        raise UserError(
            f"the autoencoder's error is {mse} after {config.steps} steps; lower autoencoder.lr ({config.lr})"
        )
    model.eval()
    factor = measure_scaling_factor(model, pixels, config.batch_size)
    model.register_to_config(scaling_factor=factor)
    return model, {"mse": mse, "scaling_factor": factor}


def load_autoencoder(location: str | Path, device: torch.device | str = "cpu") -> "AutoencoderKL":
    """A published or stored AutoencoderKL by local folder or hub id, in evaluation mode.

    Raises UserError where there is none to be had.
    """
    from diffusers import AutoencoderKL

    try:
        model = AutoencoderKL.from_pretrained(str(location), use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no autoencoder at {location!s}: {str(error).splitlines()[0]} Give autoencoder.pretrained a hub id that "
            "this machine can reach, a local folder written by save_pretrained, or an MLflow URI (models:/NAME@ALIAS); "
            "or null to fit one on the images."
        ) from error
    return model.to(device).eval().requires_grad_(False)


def autoencoder_facts(model: Any) -> dict[str, Any]:
    """Downsample factor, latent channels and scaling factor of an AutoencoderKL."""
    return {
        "downsample_factor": 2 ** (len(model.config.block_out_channels) - 1),
        "latent_channels": int(model.config.latent_channels),
        "scaling_factor": float(model.config.scaling_factor),
    }


@torch.inference_mode()
def encode_posterior(model: Any, pixels: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Posterior mean and std, float32 [N, C, h, h], of uint8 [N, S, S, 3]."""
    images = torch.from_numpy(to_model_range(pixels)).to(model.device, model.dtype)
    posterior = model.encode(images).latent_dist
    return posterior.mean.float(), posterior.std.float()


@torch.inference_mode()
def decode_to_pixels(model: Any, latents: Tensor) -> NDArray[np.uint8]:
    """uint8 [N, S, S, 3] of scaled latents [N, C, h, h]; rounded without bias: truncation of 127.5 x + 128."""
    images = model.decode((latents / model.config.scaling_factor).to(model.dtype)).sample.float()
    levels = (images * 127.5 + 128.0).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def measure_scaling_factor(model: Any, pixels: NDArray[np.uint8], batch_size: int) -> float:
    """1 / standard deviation of the latents of uint8 [N, S, S, 3]: scaled latents have unit variance."""
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(pixels), batch_size):
        mean, std = (part.double() for part in encode_posterior(model, pixels[start : start + batch_size]))
        count += mean.numel()
        total += float(mean.sum())
        squares += float((mean.square() + std.square()).sum())
    return 1.0 / float(np.sqrt(squares / count - (total / count) ** 2))

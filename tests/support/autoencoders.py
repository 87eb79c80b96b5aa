"""Small autoencoders of the published kinds, unfitted, as diffusers makes and saves them, and one of codes."""

from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL

from edt_core.autoencoders.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig


def deep_autoencoder(**settings: Any) -> AutoencoderDC:
    """An AutoencoderDC as DC-AE f32c32, with 8 to 32 channels in its levels; `settings` differ from that."""
    values: dict[str, Any] = {
        "latent_channels": 32,
        "attention_head_dim": 8,
        "scaling_factor": 0.41407,
        "downsample_block_type": "Conv",
        "upsample_block_type": "interpolate",
    }
    for side in ("encoder", "decoder"):
        values[f"{side}_block_types"] = ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2
        values[f"{side}_block_out_channels"] = (8, 8, 16, 16, 32, 32)
        values[f"{side}_layers_per_block"] = (1,) * 6
        values[f"{side}_qkv_multiscales"] = ((),) * 4 + ((5,),) * 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderDC(**{**values, **settings}).eval()


def shifted_autoencoder() -> AutoencoderKL:
    """An AutoencoderKL of factor 8 with 16 channels, a shift, and no quantisation layers: as of SD3 and FLUX."""
    levels = 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            latent_channels=16,
            block_out_channels=(8,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            norm_num_groups=8,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        ).eval()


def coding_autoencoder() -> Any:
    """An AutoencoderFSQ of factor 4."""
    return build_autoencoder(AutoencoderConfig(kind="fsq", downsample_factor=4, base_channels=8), 64).eval()


def uneven_autoencoder() -> AutoencoderKL:
    """An AutoencoderKL of factor 4 with 16 channels whose means and spreads differ by powers of ten, and no true scale.

    Its `quant_conv` multiplies mean and standard deviation of the posterior by 10^-1.5 to 10^1.5.
    """
    channels, levels = 16, 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            latent_channels=channels,
            block_out_channels=(8,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            norm_num_groups=8,
            scaling_factor=0.18215,
        ).eval()
    spread = torch.logspace(-1.5, 1.5, channels)
    with torch.no_grad():
        vae.quant_conv.weight[:channels] *= spread.view(-1, 1, 1, 1)
        vae.quant_conv.bias[:channels] += spread * torch.linspace(-8, 8, channels)
        vae.quant_conv.bias[channels:] += 2 * spread.log() - 4  # the logarithm of the variance
        vae.post_quant_conv.weight /= spread.view(1, -1, 1, 1)
    return vae

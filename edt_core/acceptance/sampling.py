"""Section D: images per second of sampling, and of an autoencoder with the shape of Stable Diffusion's.

The autoencoder is a plain network of this file's own with random weights: it has the size of the one
that diffusers loads, which a bare machine does not have, so its time and memory are about the same.

Legend: N images, S side of the images in pixels, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edt_core.acceptance.options import chain
from edt_core.acceptance.rows import Measure, Task, figure
from edt_core.acceptance.subjects import Setting, in_turns, random_model, timed
from edt_core.models import ModelConfig, has_paper_amm_blocks
from edt_core.precision import use_precision
from edt_core.sampling.sampler import LatentSampler

_IMAGES, _STEPS, _CFG_SCALE = 64, 10, 1.5
_CHANNELS = (128, 256, 512, 512)
_GROUPS = 32
_UNIT = "images/s"
_STAND_IN = "a network of SD-VAE's shape"


def tasks(setting: Setting) -> Iterator[Task]:
    """Chains of S and XL, then the autoencoder."""
    for name, seconds, gib in (("EDT-S/2", 25, 4), ("EDT-XL/2", 45, 12)) if setting.is_full else (("EDT-S/2", 0, 0),):
        config = setting.model(name)
        for precision in ("bf16", "fp32"):
            yield Task(
                f"sampling, {config.name} {precision}",
                partial(chain_rows, config, precision, setting),
                setting.seconds(seconds / 4),
                setting.gib(gib),
            )
        yield Task(
            f"sampling, {config.name} bf16 compiled",
            partial(compiled_rows, config, setting),
            setting.seconds(seconds),
            setting.gib(gib),
        )
    layouts = product(("fp32", "tf32", "bf16") if setting.on_gpu else ("fp32",), (False, True))
    for precision, channels_last in layouts:
        name = f"{precision}, {'channels last' if channels_last else 'channels first'}"
        yield Task(
            f"autoencoder, {name}",
            partial(autoencoder_rows, name, precision, channels_last, setting),
            setting.seconds(4),
            setting.gib(4),
        )
    if setting.is_full:
        for images in (8, 64):
            name = f"decoding {images} images at 512 px at once, fp32"
            yield Task(name, partial(large_rows, name, images, setting), 4, 40, may_run_out=images > 8)


def chain_rows(config: ModelConfig, precision: str, setting: Setting) -> Iterator[Measure]:
    """Guided sampling with the real sampler, without AMM and with it."""
    model = random_model(config, setting.device)
    paper = has_paper_amm_blocks(config.name, config.image_size)
    for blocks, what in (((), "no AMM"), ("paper" if paper else (0,), "AMM")):
        options = chain(
            num_sampling_steps=setting.count(_STEPS, 2), cfg_scale=_CFG_SCALE, amm_blocks=blocks, precision=precision
        )
        sampler = LatentSampler(model, options, 1000)
        yield _chain_row(f"sampling, {config.name} {precision}, {what}", sampler, setting)


def compiled_rows(config: ModelConfig, setting: Setting) -> Iterator[Measure]:
    """The same with the model compiled."""
    model = random_model(config, setting.device)
    options = chain(num_sampling_steps=setting.count(_STEPS, 2), cfg_scale=_CFG_SCALE, precision="bf16")
    sampler = LatentSampler(model, options, 1000, network=setting.compiled(model))
    name = f"sampling, {config.name} bf16 compiled, no AMM"
    yield figure(f"{name}: first chain", timed(partial(_draw, sampler, setting), setting.device), "s")
    yield _chain_row(name, sampler, setting)


def _draw(sampler: LatentSampler, setting: Setting) -> Tensor:
    count = setting.count(_IMAGES, 2)
    use_precision(sampler.chain.precision)
    return sampler([index % sampler.model.config.num_classes for index in range(count)], 0, range(count))


def _chain_row(name: str, sampler: LatentSampler, setting: Setting) -> Measure:
    seconds = _median(partial(_draw, sampler, setting), setting)
    steps = sampler.chain.num_sampling_steps
    rate = setting.count(_IMAGES, 2) / seconds
    return figure(name, rate, _UNIT, f"{steps} steps, guided; {rate * steps / 250:.2f} images/s at 250 steps")


def _median(function: Callable[[], object], setting: Setting) -> float:
    warm_up = 1 if setting.is_full else 0
    return in_turns({"": function}, setting.count(3), warm_up, setting.device)[""]


# --- the autoencoder


def autoencoder_rows(name: str, precision: str, channels_last: bool, setting: Setting) -> Iterator[Measure]:
    """Encoding and decoding at 256 px."""
    images, side = setting.count(16), 256 if setting.is_full else 32
    dtype = use_precision(precision)
    network = Autoencoder().to(setting.device, dtype).eval()
    pixels = torch.randn(images, 3, side, side, device=setting.device, dtype=dtype)
    latents = torch.randn(images, 4, side // 8, side // 8, device=setting.device, dtype=dtype)
    if channels_last:
        cast(Any, network).to(memory_format=torch.channels_last)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    for what, part, inputs in (("encoding", network.encoder, pixels), ("decoding", network.decoder, latents)):
        seconds = _median(partial(_run, part, inputs), setting)
        yield figure(f"{what} at {side} px, {name}", images / seconds, _UNIT, f"{_STAND_IN}; {images} images")


def large_rows(name: str, images: int, setting: Setting) -> Iterator[Measure]:
    """Decoding at 512 px, of which one tensor of 64 images has 16 GiB and more elements than 32-bit indices."""
    use_precision("fp32")
    decoder = Autoencoder().decoder.to(setting.device).eval()
    latents = torch.randn(images, 4, 64, 64, device=setting.device)
    torch.cuda.reset_peak_memory_stats(setting.device)
    seconds = timed(partial(_run, decoder, latents), setting.device)
    peak = torch.cuda.max_memory_allocated(setting.device) / (1 << 30)
    yield figure(name, images / seconds, _UNIT, f"{_STAND_IN}; first call, peak {peak:.1f} GiB")


@torch.no_grad()
def _run(part: nn.Module, inputs: Tensor) -> Tensor:
    out: Tensor = part(inputs)
    return out


class _Residual(nn.Module):
    """Two normalised convolutions beside a skip: [N, c, S, S] -> [N, c', S, S]."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(_GROUPS, channels), nn.GroupNorm(_GROUPS, out_channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = self.skip(x) + self.conv2(F.silu(self.norm2(inner)))
        return out


class _Mixing(nn.Module):
    """Attention of one head among all places: [N, c, S, S] -> [N, c, S, S]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        mixed = self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + mixed.transpose(1, 2).reshape(x.shape)


class _Halving(nn.Module):
    """A convolution with stride 2, padded at the right and at the bottom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class _Doubling(nn.Module):
    """The nearest pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Autoencoder(nn.Module):
    """`encoder`: [N, 3, S, S] -> [N, 8, S/8, S/8], mean and log variance; `decoder`: [N, 4, S/8, S/8] -> [N, 3, S, S].

    Two residual layers a level in the encoder and three in the decoder, with attention in the middle, as in Stable
    Diffusion's (Rombach et al. 2022).
    """

    def __init__(self) -> None:
        super().__init__()
        widest = _CHANNELS[-1]
        levels = [*_levels(_CHANNELS, 2, _Halving)]
        self.encoder = nn.Sequential(
            nn.Conv2d(3, _CHANNELS[0], 3, padding=1), *levels, *_middle(widest), *_end(widest, 8), nn.Conv2d(8, 8, 1)
        )
        levels = [*_levels(_CHANNELS[::-1], 3, _Doubling)]
        self.decoder = nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.Conv2d(4, widest, 3, padding=1), *_middle(widest), *levels, *_end(_CHANNELS[0], 3)
        )


def _levels(channels: tuple[int, ...], layers: int, resize: Callable[[int], nn.Module]) -> Iterator[nn.Module]:
    """The layers of each level, and a change of the side after all but the last."""
    before = channels[0]
    for level, width in enumerate(channels):
        for _ in range(layers):
            yield _Residual(before, width)
            before = width
        if level < len(channels) - 1:
            yield resize(width)


def _middle(channels: int) -> tuple[nn.Module, ...]:
    return _Residual(channels, channels), _Mixing(channels), _Residual(channels, channels)


def _end(channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return nn.GroupNorm(_GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)

"""The image autoencoder: fit a small one, load a published one, and convert between pixels and latents.

Legend: N images, S image side in pixels, C latent channels, h latent side (S / downsample factor).
Encoding: pixels uint8 0..255 -> images float32 -1..1 -> posterior (mean, std) of raw latents.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edt_core.autoencoders.check import check_config, check_folder, hub_pipeline, pickled
from edt_core.autoencoders.kinds import KINDS, kind_of, scale_of
from edt_core.autoencoders.parts import in_parts
from edt_core.config import AutoencoderConfig
from edt_core.cpu_units import units
from edt_core.data.images import to_model_range
from edt_core.data.scale import model_scale
from edt_core.errors import UserError
from edt_core.files.tensor_files import check_folder_headers
from edt_core.models import ModelConfig
from edt_core.models.alignment import align_weights
from edt_core.models.families.codes import codes_of
from edt_core.network.hub import hub_is_away, loading_failure
from edt_core.one_cycle import one_cycle
from edt_core.precision import exact_products, use_precision

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from edt_core.autoencoders.fsq import AutoencoderFSQ

_FLIPS = 1  # tells the draws of mirror images from those of batches


def build_autoencoder(config: AutoencoderConfig, image_size: int) -> "AutoencoderKL | AutoencoderFSQ":
    """An unfitted autoencoder: each level after the first halves the side and doubles the channels."""
    levels = config.downsample_factor.bit_length()
    sizes: dict[str, Any] = {
        "block_out_channels": tuple(config.base_channels * 2**level for level in range(levels)),
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.kind == "fsq":
            from edt_core.autoencoders.fsq import AutoencoderFSQ

            return AutoencoderFSQ(**sizes)
        from diffusers import AutoencoderKL

        return AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=config.latent_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            sample_size=image_size,
            **sizes,
        )


@exact_products()
def fit_autoencoder(
    config: AutoencoderConfig,
    pixels: NDArray[np.uint8],
    device: torch.device | str = "cpu",
    report: Callable[[int, float], None] = lambda step, mse: None,
) -> tuple["AutoencoderKL | AutoencoderFSQ", dict[str, float]]:
    """Fit on uint8 [N, S, S, 3] by squared error and a small KL term (Rombach et al. 2022, without the adversary).

    Returns the autoencoder, with its measured scaling factor in its config, and {"mse", "scaling_factor"}. Codes have
    no KL term, and a scaling factor of 1; instead `codes_used` counts those of the images. Batches and posterior draws
    depend on (seed, step) only. The fit computes in float32, without TF32.
    """
    model = build_autoencoder(config, pixels.shape[1]).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, foreach=True)
    schedule = one_cycle(optimizer, config.lr, config.steps)
    mse = float("nan")
    for step in range(config.steps):
        batch = np.random.default_rng([config.seed, step]).integers(0, len(pixels), config.batch_size)
        images = torch.from_numpy(to_model_range(_augmented(config, pixels[batch], step))).to(device)
        decoded, kl = _decoded(config, model, images, step)
        error = (decoded - images).square().mean()
        loss = error if kl is None else error + config.kl_weight * kl
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
    model.eval().requires_grad_(False)  # as a loaded one: torch.matmul chooses its kernels by it
    if config.kind == "fsq":
        return model, {"mse": mse, "scaling_factor": 1.0, "codes_used": _codes_used(model, pixels, config.batch_size)}
    factor = measure_scaling_factor(model, pixels, config.batch_size)
    model.register_to_config(scaling_factor=factor)
    return model, {"mse": mse, "scaling_factor": factor}


def _decoded(config: AutoencoderConfig, model: Any, images: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
    """Images encoded and decoded, and the mean KL divergence of their posteriors; None for codes."""
    if config.kind == "fsq":
        return model(images), None
    posterior = model.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(config.seed + step))
    return model.decode(posterior.mean + posterior.std * noise.to(images.device)).sample, posterior.kl().mean()


@exact_products()
def _codes_used(model: Any, pixels: NDArray[np.uint8], batch_size: int) -> int:
    """The number of different codes of uint8 [N, S, S, 3]. Raises UserError if there is only one."""
    batches = (pixels[start : start + batch_size] for start in range(0, len(pixels), batch_size))
    used = torch.cat([codes_of(encode_posterior(model, batch)[:, 0]).unique() for batch in batches]).unique()
    if len(used) == 1:
        raise UserError(
            "the autoencoder has one code for all images. Use more steps (autoencoder.steps), a lower learning rate "
            "(autoencoder.lr), or images that differ"
        )
    return len(used)


def _augmented(config: AutoencoderConfig, pixels: NDArray[np.uint8], step: int) -> NDArray[np.uint8]:
    """Pixels uint8 [N, S, S, 3] of a step, some mirrored. The draw is of (seed, step), and changes no other draw."""
    if config.augment == "none":
        return pixels
    mirrored = np.random.default_rng([config.seed, step, _FLIPS]).random(len(pixels)) < 0.5
    return np.where(mirrored[:, None, None, None], pixels[:, :, ::-1], pixels)


def load_autoencoder(location: str | Path, device: torch.device | str = "cpu") -> Any:
    """Load an autoencoder of a supported kind from a local folder or hub id, in evaluation mode.

    Raises UserError if there is none, and for a configuration with unsupported settings.
    """
    if Path(location).is_dir():
        check_folder(Path(location))
        check_folder_headers(Path(location))
    away = hub_is_away(location)
    config = _load_config(location, away)
    check_config(str(location), config)
    model_class = KINDS[config["_class_name"]].model_class
    try:
        model, loading = model_class.from_pretrained(
            str(location),
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            local_files_only=away,  # without the hub, its cache on this machine may have the model
        )
        if missing := [*loading["missing_keys"], *loading["mismatched_keys"]]:
            raise ValueError(f"{len(missing)} tensors are missing or have another shape, {missing[0]} first.")
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ArithmeticError) as error:
        if not Path(location).is_dir() and "does not appear to have a file named" in str(error):
            target = str(location).rpartition("/")[2]
            raise UserError(pickled(str(location), model_class.__name__, f"./{target}")) from error
        cause = loading_failure(error, away)
        raise _no_autoencoder(location, cause) from cause
    return align_weights(model).to(device).eval().requires_grad_(False)


def _load_config(location: str | Path, away: bool) -> dict[str, Any]:
    """The diffusers configuration at a local folder or hub id (if `away`, in the hub's cache). Raises UserError."""
    from diffusers import AutoencoderKL, DiffusionPipeline

    try:
        return dict(AutoencoderKL.load_config(str(location), local_files_only=away))
    except (OSError, ValueError, KeyError, TypeError) as error:
        is_pipeline = False
        with suppress(Exception):  # the first error is the one to report
            is_remote = not (away or Path(location).is_dir())
            is_pipeline = is_remote and bool(DiffusionPipeline.load_config(str(location)))
        if is_pipeline:
            raise UserError(hub_pipeline(str(location))) from error
        cause = loading_failure(error, away)
        raise _no_autoencoder(location, cause) from cause


def _no_autoencoder(location: str | Path, cause: Exception) -> UserError:
    return UserError(
        f"no autoencoder at {location!s}: {str(cause).splitlines()[0]} Use a hub id that this machine can reach, "
        "a local folder written by save_pretrained, or an MLflow URI (models:/NAME@ALIAS); in a pipeline, set "
        "autoencoder.pretrained to it, or to null to fit an autoencoder on the images."
    )


def autoencoder_facts(model: Any) -> dict[str, Any]:
    """Downsample factor, latent channels and scale of a loaded autoencoder.

    The scale is `scaling_factor` and, if the configuration has them, `shift_factor`, `latents_mean`, `latents_std`.
    """
    return kind_of(model).facts(model.config)


@torch.inference_mode()
def encode_posterior(model: Any, pixels: NDArray[np.uint8] | Tensor) -> Tensor:
    """Posterior float32 [N, 2, C, h, h], mean and std, of pixels uint8 [N, S, S, 3].

    For a deterministic encoder the mean is its latents, and the std is 0.
    """
    levels = torch.as_tensor(pixels).to(model.device, non_blocking=True)
    images = levels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()
    if len(images) == 1:  # PyTorch convolves a single image by another algorithm, with other rounding than a batch
        images = images.expand(2, -1, -1, -1).contiguous()
    mean, std = kind_of(model).encode(model, images.to(model.dtype))
    return torch.stack([mean.float(), std.float()], dim=1)[: len(levels)]


@torch.inference_mode()
def encode_both_sides(
    model: Any, batches: Iterable[tuple[Any, NDArray[np.uint8]]]
) -> Iterator[tuple[Any, NDArray[np.float32]]]:
    """Yield (tag, posterior float32 [N, 2, 2, C, h, h]) for each (tag, pixels uint8 [N, S, S, 3]).

    The second axis is (image, mirror image), the third (mean, std). A batch's results are fetched after the next batch
    was submitted to the accelerator, so that it never waits for the host. On a CPU a row is a function of its image
    alone: see `edt_core.cpu_units`.
    """
    on_cuda = model.device.type == "cuda"
    pending: tuple[Any, Tensor, Any] | None = None

    def fetched(tag: Any, posterior: Tensor, ready: Any) -> tuple[Any, NDArray[np.float32]]:
        if ready is not None:
            ready.synchronize()
        return tag, posterior.numpy()

    for tag, pixels in batches:
        levels = torch.from_numpy(pixels)
        if on_cuda:
            levels = levels.pin_memory().to(model.device, non_blocking=True)
        posterior, ready = _both_sides(model, levels), None
        if on_cuda:
            host = torch.empty(posterior.shape, dtype=posterior.dtype, pin_memory=True)
            posterior = host.copy_(posterior, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        if pending is not None:
            yield fetched(*pending)
        pending = (tag, posterior, ready)
    if pending is not None:
        yield fetched(*pending)


def _both_sides(model: Any, levels: Tensor) -> Tensor:
    """Posterior [N, 2, 2, C, h, h] of levels uint8 [N, S, S, 3] on the model's device."""
    if model.device.type == "cpu":
        return torch.cat([_sides(model, unit)[:count] for unit, count in units(levels)])
    return torch.cat([_sides(model, levels[part]) for part in in_parts(len(levels), levels.shape[1])])


def _sides(model: Any, levels: Tensor) -> Tensor:
    return torch.stack([encode_posterior(model, view) for view in (levels, levels.flip(2))], dim=1)


def precision_error(model: Any, exact: Any, pixels: NDArray[np.uint8], precision: str) -> dict[str, float]:
    """The error ("max", "rms") of posterior means in a lower precision, in standard deviations of those in fp32.

    `model` has weights in `precision`, `exact` in fp32.
    """
    low = encode_posterior(model, pixels)[:, 0].cpu().double()
    use_precision("fp32")
    try:
        full = encode_posterior(exact, pixels)[:, 0].cpu().double()
    finally:
        use_precision(precision)
    error = (low - full) / full.std().clamp(min=torch.finfo(torch.float64).tiny)  # the std is 0 for constant latents
    return {"max": float(error.abs().max()), "rms": float(error.square().mean().sqrt())}


@torch.inference_mode()
def decode_to_pixels(model: Any, latents: Tensor, config: ModelConfig | None) -> NDArray[np.uint8]:
    """Pixels uint8 [N, S, S, 3] of latents [N, C, h, h], scaled as in `decode`."""
    return to_pixels(decode(model, latents, config))


def decode(model: Any, latents: Tensor, config: ModelConfig | None) -> Tensor:
    """Images [N, 3, S, S] in about -1..1, in the autoencoder's dtype, of scaled latents [N, C, h, h].

    The scale is that of the diffusion model with the configuration `config`; with None, the autoencoder's own.
    Latents are decoded in parts of fixed size, see `edt_core.autoencoders.parts`.
    """
    own = scale_of(model)
    scale = own if config is None else model_scale(config, own)
    kind, raw = kind_of(model), scale.to_raw(latents).to(model.dtype)
    side = raw.shape[-1] * kind.downsample_factor(model.config)
    parts = [kind.decode(model, raw[part]) for part in in_parts(len(raw), side)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Pixels uint8 [N, S, S, 3] of images [N, 3, S, S] in -1..1; rounded without bias: truncation of 127.5 x + 128."""
    levels = (images.float() * 127.5 + 128.0).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@exact_products()
def measure_scaling_factor(model: Any, pixels: NDArray[np.uint8], batch_size: int) -> float:
    """1 / standard deviation of the latents of uint8 [N, S, S, 3]: scaled latents have unit variance.

    Raises UserError for latents that do not vary.
    """
    count, total, squares = 0, 0.0, 0.0
    for start in range(0, len(pixels), batch_size):
        mean, std = encode_posterior(model, pixels[start : start + batch_size]).double().unbind(1)
        count += mean.numel()
        total += float(mean.sum())
        squares += float((mean.square() + std.square()).sum())
    mean_square, mean_of_all = squares / count, total / count
    variance = mean_square - mean_of_all**2
    if not variance > count * np.finfo(np.float64).eps * mean_square:  # constant latents: rounding errors remain
        raise UserError(
            f"the autoencoder's latents do not vary: their variance is {variance:.3g} around {mean_of_all:.3g}. "
            "Use more steps (autoencoder.steps), a lower learning rate (autoencoder.lr), or images that differ"
        )
    return 1.0 / float(np.sqrt(variance))

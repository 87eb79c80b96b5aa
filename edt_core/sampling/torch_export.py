"""A model's denoiser as a `torch.export` program: one file that runs without this package.

`torch.export.load(path).module()(x, t, y)`: latents [N, C, h, h] and timesteps [N] in float32, labels int64 [N] ->
what the model's objective has it predict [N, 2C, h, h], for any N: noise and variance, unless the configuration in the
file names another objective. Loading unpickles: take a program from nobody whose code you would not run.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edt_core.config import ChainConfig
from edt_core.models import DiffusionTransformer
from edt_core.sampling.sampler import LatentSampler

PROGRAM = "denoiser.pt2"
TOLERANCE = 1e-5  # of the largest value: the program runs the same kernels, but may fuse or order them otherwise
_TRACED, _CHECKED = 2, (1, 3)  # batch sizes; 1 is what tracing most easily takes for a constant
_FACTS = "model.json"  # in the file, beside the program: the model's configuration, AMM included


def save_program(path: Path, model: DiffusionTransformer, chain: ChainConfig, num_timesteps: int) -> None:
    """Write the denoiser with the AMM of a chain, and check it: loaded again, it gives what the model gives.

    The model is put into evaluation mode, on the CPU in float32, and needs no gradients any more.
    Raises RuntimeError where the program does not give what the model gives; no file is left then.
    """
    denoiser = LatentSampler(model.cpu().float(), chain, num_timesteps).model.requires_grad_(False)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch to itself, while it traces
        program = torch.export.export(denoiser, _inputs(denoiser, _TRACED), dynamic_shapes=({0: batch},) * 3)
        _forget_places(program)
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files={_FACTS: json.dumps(denoiser.config.to_dict())})
    try:
        _check(path, denoiser)
    except BaseException:
        path.unlink()
        raise


def _forget_places(program: torch.export.ExportedProgram) -> None:
    """Remove from each operation the lines of source it comes from, with the paths they have on this machine."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _check(path: Path, denoiser: DiffusionTransformer) -> None:
    """Raise RuntimeError unless the program of a file, which was written by this process, does as the model."""
    program: Any = torch.export.load(path).module()
    for size in _CHECKED:
        inputs = _inputs(denoiser, size)
        with torch.no_grad():
            expected, found = denoiser(*inputs), program(*inputs)
        error, largest = float((found - expected).abs().max()), float(expected.abs().max())
        if not error <= TOLERANCE * largest:
            raise RuntimeError(
                f"the exported {denoiser.config.name} is off by {error:.3g} in a batch of {size}, where values go up "
                f"to {largest:.3g}: torch.export of PyTorch {torch.__version__} cannot be relied on here"
            )


def _inputs(denoiser: DiffusionTransformer, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and labels of a batch; the last label is the null class."""
    config, generator = denoiser.config, torch.Generator().manual_seed(size)
    shape = (size, config.in_channels, config.latent_size, config.latent_size)
    labels = torch.arange(config.num_classes + 1 - size, config.num_classes + 1).clamp(min=0)
    return torch.randn(shape, generator=generator), torch.linspace(0, 900, size), labels

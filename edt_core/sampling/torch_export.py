"""A model's denoiser as a `torch.export` program: one file that runs without this package.

`torch.export.load(path).module()(x, t, y)`: latents [N, C, h, h] and timesteps [N] in float32, labels int64 [N] ->
the model's output [N, 2C, h, h], for any N: noise and variance, unless the configuration in the file has another
objective. Loading unpickles: only load programs from sources whose code you would run.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edt_core.config import ChainConfig
from edt_core.diffusion import objective_of_model
from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer
from edt_core.sampling.sampler import LatentSampler

PROGRAM = "denoiser.pt2"
TOLERANCE = 1e-5  # of the largest value: the program runs the same kernels, but may fuse or reorder them
_TRACED, _CHECKED = 2, (1, 3)  # batch sizes; tracing most easily mistakes a size of 1 for a constant
_FACTS = "model.json"  # in the file, beside the program: the model's configuration, including AMM


def save_program(path: Path, model: DiffusionTransformer, chain: ChainConfig, num_timesteps: int) -> None:
    """Write the denoiser with the AMM of a chain, load it again, and check that its output equals the model's.

    The model is moved to the CPU in float32, set to evaluation mode, and its gradients are turned off.
    Raises UserError for a quantised model, and RuntimeError if the outputs differ; the file is then removed.
    """
    if (quantization := model.config.quantization) is not None:
        raise UserError(
            f"the model is quantised ({quantization.scheme}), and a program of torch.export would need torchao where "
            "it runs; export the version that it was made from"
        )
    alone = chain.model_copy(update={"guidance_reference": None})  # guidance is not in the program
    denoiser = LatentSampler(model.cpu().float(), alone, num_timesteps).model.requires_grad_(False)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about PyTorch's own code, while tracing
        program = torch.export.export(denoiser, _inputs(denoiser, _TRACED), dynamic_shapes=({0: batch},) * 3)
        _remove_paths(program)
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files={_FACTS: json.dumps(denoiser.config.to_dict())})
    try:
        _check(path, denoiser)
    except BaseException:
        path.unlink()
        raise


def _remove_paths(program: torch.export.ExportedProgram) -> None:
    """Remove the stack trace of each operation, which contains paths of this machine."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)


def _check(path: Path, denoiser: DiffusionTransformer) -> None:
    """Raise RuntimeError unless the program of a file written by this process has the same output as the model."""
    program: Any = torch.export.load(path).module()
    for size in _CHECKED:
        inputs = _inputs(denoiser, size)
        with torch.no_grad():
            expected, output = denoiser(*inputs), program(*inputs)
        error, largest = float((output - expected).abs().max()), float(expected.abs().max())
        if not error <= TOLERANCE * largest:
            raise RuntimeError(
                f"the exported {denoiser.config.name} is off by {error:.3g} in a batch of {size}, with values up to "
                f"{largest:.3g}: torch.export of PyTorch {torch.__version__} exports this model incorrectly"
            )


def _inputs(denoiser: DiffusionTransformer, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, times and labels of a batch; the last label is the null class."""
    config, generator = denoiser.config, torch.Generator().manual_seed(size)
    shape = (size, config.in_channels, config.latent_size, config.latent_size)
    end = 0.9 * objective_of_model(config).end_of_time(1000)
    labels = torch.arange(config.num_classes + 1 - size, config.num_classes + 1).clamp(min=0)
    return torch.randn(shape, generator=generator), torch.linspace(0, end, size), labels

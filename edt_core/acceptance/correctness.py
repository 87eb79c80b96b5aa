"""Section A, the models: outputs and gradients on the device against float64 on the CPU.

Legend: B images, 2B rows (the full pass, then the masked one), T tokens, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edt_core.acceptance.rows import Measure, Task, at_least, at_most
from edt_core.acceptance.subjects import Setting, randomized, relative_error
from edt_core.models import ModelConfig, amm_matrix, draw_masks
from edt_core.models.attention import (
    Attention,
    RelativePositionBias,
    fused_modulated_attention,
    modulation_mask,
    written_out_attention,
)
from edt_core.models.config import AMM_KERNELS, AmmKernel
from edt_core.precision import use_precision

MODELS = ("EDT-S/2", "DiT-S/2", "MDTv2-S/2")
_UNIT = "rel. rms"
# Largest relative error of the output, and of the gradient of any one parameter; least cosine of the whole gradient.
# On a CPU, MDTv2-S has the largest ones: 9e-7 and 2e-6 in fp32, 0.013 and 0.024 in bf16. TF32 has 3 more bits.
_BOUNDS = {"fp32": (1e-5, 1e-5, 0.999999), "tf32": (4e-3, 1e-2, 0.9999), "bf16": (2e-2, 5e-2, 0.999)}
_AMM_BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Inputs:
    """Inputs of a pass, float32 on the CPU, and the gradient of its output."""

    x: Tensor
    t: Tensor
    y: Tensor
    masks: list[Tensor] | None
    gradient: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """The same on a device, floating-point values in a dtype."""
        masks = None if self.masks is None else [mask.to(device) for mask in self.masks]
        x, gradient = (tensor.to(device, dtype) for tensor in (self.x, self.gradient))
        return Inputs(x, self.t.to(device), self.y.to(device), masks, gradient)


@dataclass(frozen=True)
class Outcome:
    """The output of a pass, and the gradient of each parameter."""

    output: Tensor
    gradients: dict[str, Tensor]


def tasks(setting: Setting) -> Iterator[Task]:
    """Settings of precision, models, head padding, modulated attention."""
    yield Task("settings of float32 products", settings_of_products)
    for name in MODELS:
        config = setting.model(name)
        precisions = ("fp32", "tf32", "bf16") if setting.on_gpu else ("fp32", "bf16")
        yield Task(config.name, partial(model_rows, config, precisions, setting), setting.seconds(15))
    yield Task("head padding", lambda: padding_rows(setting.device))
    sides = (4, 8, 16, 32) if setting.is_full else (4, 8)
    for kernel in AMM_KERNELS:
        name = f"modulated attention, {kernel}"
        yield Task(name, partial(amm_rows, kernel, sides, setting.device), setting.seconds(3))


def compiled_tasks(setting: Setting) -> Iterator[Task]:
    """The first model, compiled: the longest task."""
    config = setting.model(MODELS[0])
    yield Task(f"{config.name}, compiled", lambda: compiled_rows(config, setting), setting.seconds(45))


def settings_of_products() -> Iterator[Measure]:
    """Settings that libraries read raise RuntimeError if they were set by one of their two names alone."""
    for precision in ("tf32", "bf16", "fp16", "fp32"):
        use_precision(precision)
        unreadable = []
        for name in ("get_float32_matmul_precision()", "backends.cuda.matmul.allow_tf32", "backends.cudnn.allow_tf32"):
            try:
                _setting(name)
            except RuntimeError:
                unreadable.append(name)
        note = f"torch.{', torch.'.join(unreadable)}" if unreadable else ""
        yield at_most(f"settings that cannot be read after {precision}", len(unreadable), 0, note=note)


def _setting(name: str) -> object:
    value: Any = torch
    for part in name.removesuffix("()").split("."):
        value = getattr(value, part)
    return value() if name.endswith("()") else value


def model_rows(config: ModelConfig, precisions: Sequence[str], setting: Setting) -> Iterator[Measure]:
    """A model's output and gradients in each precision."""
    model, inputs = randomized(config).train(), pass_inputs(config, setting.count(8, 2))
    exact = run_pass(model.double(), inputs.to(torch.device("cpu"), torch.float64), "fp32")
    model = model.float().to(setting.device)
    for precision in precisions:
        found = run_pass(model, inputs.to(setting.device, torch.float32), precision)
        yield from compare(f"{config.name} {precision}", found, exact, precision)


def compiled_rows(config: ModelConfig, setting: Setting) -> Iterator[Measure]:
    """The output and the gradients of a compiled model in bf16."""
    model, inputs = randomized(config).train(), pass_inputs(config, setting.count(8, 2))
    exact = run_pass(model.double(), inputs.to(torch.device("cpu"), torch.float64), "fp32")
    model = model.float().to(setting.device)
    found = run_pass(model, inputs.to(setting.device, torch.float32), "bf16", setting.compiled(model))
    yield from compare(f"{config.name} bf16 compiled", found, exact, "bf16")


def pass_inputs(config: ModelConfig, images: int) -> Inputs:
    """Random inputs of a full and a masked pass, as one batch; of a model without masks, of full passes."""
    rng, rows = torch.Generator().manual_seed(1), 2 * images
    shape = (rows, config.in_channels, config.latent_size, config.latent_size)
    out_shape = (rows, config.out_channels, *shape[2:])
    return Inputs(
        x=torch.randn(shape, generator=rng),
        t=torch.randint(1000, (rows,), generator=rng),
        y=torch.randint(config.num_classes + 1, (rows,), generator=rng),
        masks=draw_masks(config, images, rng) or None,
        gradient=torch.randn(out_shape, generator=rng) / out_shape[0],
    )


def run_pass(model: nn.Module, inputs: Inputs, precision: str, network: Any = None) -> Outcome:
    """The output and the gradients of a forward and a backward pass in a precision."""
    use_precision(precision)
    model.zero_grad(set_to_none=True)
    device = inputs.x.device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        output = (model if network is None else network)(inputs.x, inputs.t, inputs.y, inputs.masks)
    (output.to(inputs.gradient.dtype) * inputs.gradient).sum().backward()
    gradients = {
        name: _copied(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return Outcome(_copied(output), gradients)


def _copied(tensor: Tensor) -> Tensor:
    """A copy in float64 on the CPU. Without the copy, a model's later change of dtype would change it too."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


def compare(name: str, found: Outcome, exact: Outcome, precision: str) -> Iterator[Measure]:
    """The errors of a pass, with the parameter whose gradient is the worst."""
    of_output, of_gradient, least_cosine = _BOUNDS[precision]
    errors = {key: relative_error(found.gradients[key], value) for key, value in exact.gradients.items()}
    tables = {key: error for key, error in errors.items() if key.endswith("bias_table")}
    yield at_most(f"{name}: output", relative_error(found.output, exact.output), of_output, _UNIT)
    yield _worst(f"{name}: worst gradient of {len(errors)}", errors, of_gradient)
    if tables:
        yield _worst(f"{name}: worst of {len(tables)} bias tables", tables, of_gradient)
    yield at_least(f"{name}: cosine of the whole gradient", _cosine(found, exact), least_cosine)


def _worst(name: str, errors: dict[str, float], bound: float) -> Measure:
    key = _largest(errors)
    return at_most(name, errors[key], bound, _UNIT, key)


def _largest(errors: dict[Any, float]) -> Any:
    """The key of the largest error. NaN is the largest: `max` would ignore one that is not the first."""
    return max(errors, key=lambda key: math.inf if math.isnan(errors[key]) else errors[key])


def _cosine(found: Outcome, exact: Outcome) -> float:
    mine, reference = (
        torch.cat([outcome.gradients[key].flatten() for key in exact.gradients]) for outcome in (found, exact)
    )
    return float(torch.dot(mine, reference) / torch.linalg.vector_norm(mine) / torch.linalg.vector_norm(reference))


def padding_rows(device: torch.device) -> Iterator[Measure]:
    """Attention whose heads of 52 channels are padded to 56, as for a GPU's fused kernels, against 52 channels."""
    attention = _random_attention(312, 6, 8).to(device)
    x = torch.randn(4, 64, 312, generator=torch.Generator().manual_seed(2)).to(device)
    use_precision("fp32")
    outputs, gradients = [], []
    for padding in (0, 4):
        attention.zero_grad(set_to_none=True)
        output = _padded(attention, x, padding)
        output.square().sum().backward()
        outputs.append(output)
        gradients.append([parameter.grad for parameter in attention.parameters() if parameter.grad is not None])
    pairs = enumerate(zip(gradients[1], gradients[0], strict=True))
    errors = {place: relative_error(mine, reference) for place, (mine, reference) in pairs}
    yield at_most("heads of 52 channels padded to 56: output", relative_error(outputs[1], outputs[0]), 1e-5, _UNIT)
    yield at_most("heads of 52 channels padded to 56: worst gradient", errors[_largest(errors)], 1e-4, _UNIT)


def _random_attention(dim: int, heads: int, grid: int) -> Attention:
    attention = Attention(dim, heads, grid, RelativePositionBias(grid, heads))
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=rng))
    return attention


def _padded(attention: Attention, x: Tensor, padding: int) -> Tensor:
    """Attention as its forward pass computes it, with a padding of choice: [N, T, D] -> [N, T, D]."""
    qkv_weight, qkv_bias, proj_weight = attention.weights(padding)
    heads = nn.functional.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
    bias = attention.rel_pos_bias() if attention.rel_pos_bias is not None else None
    scale = attention.head_dim**-0.5
    mask = None if bias is None else bias.unsqueeze(0)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return nn.functional.linear(mixed.transpose(1, 2).flatten(2), proj_weight, attention.proj.bias)


def amm_rows(kernel: AmmKernel, sides: Sequence[int], device: torch.device) -> Iterator[Measure]:
    """Modulated attention in the fused kernel against the plain operations in float64, worst of all grids."""
    use_precision("fp32")
    for dtype, bound in _AMM_BOUNDS.items():
        errors = {side * side: _amm_error(side, kernel, dtype, device) for side in sides}
        tokens = _largest(errors)
        name = f"modulated attention, {kernel}, {str(dtype).removeprefix('torch.')}"
        note = f"{tokens} tokens; of {', '.join(map(str, errors))}"
        yield at_most(name, errors[tokens], bound, _UNIT, note)


@torch.no_grad()
def _amm_error(side: int, kernel: AmmKernel, dtype: torch.dtype, device: torch.device) -> float:
    rng, tokens = torch.Generator().manual_seed(side), side * side
    q, k, v = (torch.randn(2, 6, tokens, 56, generator=rng).to(dtype) for _ in range(3))
    bias, amm, scale = torch.randn(6, tokens, tokens, generator=rng), amm_matrix(side, kernel), 52**-0.5
    exact = written_out_attention(q.double(), k.double(), v.double(), bias.double(), scale, amm.double())
    mask = modulation_mask(amm, bias).to(device, dtype)
    found = fused_modulated_attention(q.to(device), k.to(device), v.to(device), mask, scale, amm[0, 0].to(device))
    return relative_error(found, exact)

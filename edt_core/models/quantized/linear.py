"""A linear layer with quantised weights. torchao quantises and multiplies; the layer stores the parts as plain tensors.

So a state dict, a safetensors file and every program that reads them have ordinary tensors: integers and their scales.

Legend: D = width of the input, D' = of the output, G = groups of a row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edt_core.errors import UserError
from edt_core.models.quantized.record import Quantization
from edt_core.models.weight_memo import made_once

_FP8_CAPABILITY = (8, 9)  # compute capability of the first GPUs that multiply float8: Ada, Hopper


class QuantizedLinear(nn.Module):
    """x [..., D] -> [..., D'], with the parts of torchao's tensor as buffers: `qdata`, `scale`, and maybe `zero_point`.

    `qdata` is int8 [D', D]; int4 is packed in pairs, uint8 [D', D/2]; of float8 it has the bits, as uint8 [D', D], so
    that no program that casts floats casts them. `scale` and `zero_point` are [D', 1], or [D', G] in int4. The bias is
    a parameter in float. A cast to another dtype changes the bias alone: the parts have the dtypes that torchao gave
    them. float8 multiplies in bfloat16, all else in the dtype of x or of autocast.
    """

    def __init__(self, linear: nn.Linear, quantization: Quantization) -> None:
        """The layer with the quantised weights of `linear`. Raises UserError as `check_scheme`."""
        super().__init__()
        check_scheme(quantization.scheme)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme = quantization.scheme
        tensor = _quantized(linear.weight.detach(), quantization)
        names, attributes = tensor.__tensor_flatten__()
        self._kind, self._attributes, self._parts = type(tensor), attributes, tuple(names)
        for name in names:
            part = getattr(tensor, name)
            self.register_buffer(name, self._stored(part) if name == "qdata" else part.contiguous())
        self._built: Tensor | None = None
        self._exact_on_cpu = exact_int8_products()
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Project: [..., D] -> [..., D']."""
        on = x.device.type
        dtype = torch.get_autocast_dtype(on) if torch.is_autocast_enabled(on) else x.dtype
        inner = torch.bfloat16 if self.scheme == "fp8" else dtype
        bias = None if self.bias is None else self.bias.to(inner)
        if self.scheme == "int8" and on == "cpu" and not self._exact_on_cpu:
            return self._in_float(x.to(inner), bias)
        weight = self._built
        if weight is None:
            weight = made_once((self, inner), lambda: self.weight(inner))
        return F.linear(x.to(inner), weight, bias).to(dtype)

    def _in_float(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The int8 product of x [..., D], with the same rounded numbers as floats."""
        rows = x.flatten(0, -2)
        rounded = _torchao().Int8Tensor.from_hp(rows, _torchao().PerRow()).dequantize().view_as(x)
        weight: Any = made_once((self, x.dtype), lambda: self.weight(x.dtype))
        return F.linear(rounded, weight.dequantize(), bias)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """torchao's tensor [D', D] of the parts, for products in a dtype."""
        parts = {name: getattr(self, name) for name in self._parts}
        parts["qdata"] = self._restored(parts["qdata"])
        kind: Any = self._kind
        tensor: Tensor = kind.__tensor_unflatten__(parts, {**self._attributes, "dtype": dtype}, None, None)
        return tensor

    def build(self) -> None:
        """Build torchao's tensor now, in float32, and keep it until the layer is moved or cast.

        A compiler can trace what is done with such a tensor, but not how it is made.
        """
        self._built = self.weight(torch.float32)

    def extra_repr(self) -> str:
        """Widths and scheme."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"

    def _stored(self, qdata: Tensor) -> Tensor:
        self._dtype = qdata.dtype
        if self.scheme == "int4-weights":
            return _packed(qdata)
        return qdata.contiguous().view(torch.uint8 if qdata.is_floating_point() else qdata.dtype)

    def _restored(self, qdata: Tensor) -> Tensor:
        """The inverse of `_stored`."""
        return _unpacked(qdata) if self.scheme == "int4-weights" else qdata.view(self._dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As of nn.Module, but a cast leaves the parts as they are: a rounded scale would be another weight."""
        before = {name: getattr(self, name) for name in self._parts}
        super()._apply(fn, recurse)
        self._built = None
        for name, part in before.items():
            moved = getattr(self, name)
            if moved.dtype != part.dtype:
                setattr(self, name, part.to(moved.device))
        return self


@cache
def exact_int8_products() -> bool:
    """Whether PyTorch's int8 products are exact on this CPU. Without VNNI they saturate in sums of 16 bits.

    They are tried, because oneDNN may have been limited to kernels of an older processor.
    """
    signed = torch.full((64, 64), 127, dtype=torch.int8, device="cpu")  # models are also built with "meta" as device
    unsigned = torch.full((64, 64), 255, dtype=torch.uint8, device="cpu")  # torchao multiplies either with int8
    return all(bool((torch._int_mm(a, signed) == int(a[0, 0]) * 127 * 64).all()) for a in (signed, unsigned))


def check_scheme(scheme: str) -> None:
    """Raise UserError if torchao is not installed, or this machine cannot compute in the scheme."""
    _torchao()
    if scheme != "fp8":
        return
    if not torch.cuda.is_available():
        found = "this machine has no CUDA device"
    elif torch.version.hip is not None or torch.cuda.get_device_capability() >= _FP8_CAPABILITY:
        return
    else:
        major, minor = torch.cuda.get_device_capability()
        found = f"{torch.cuda.get_device_name()} has {major}.{minor}"
    needed = ".".join(map(str, _FP8_CAPABILITY))
    raise UserError(
        f"fp8 needs a GPU of compute capability {needed} or newer (Ada, Hopper, Blackwell), but {found}; use int8, "
        "which works on every machine"
    )


def _torchao() -> Any:
    try:
        return importlib.import_module("torchao.quantization")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "torchao":
            raise
        raise UserError(
            "quantised models need torchao, which is not installed; install it with pip install "
            "'edt-pipeline[quantize]'"
        ) from None


def _quantized(weight: Tensor, quantization: Quantization) -> Any:
    """torchao's tensor of a weight [D', D], by its public entry `quantize_`."""
    ao = _torchao()
    # Otherwise torchao would set the precision of float32 products for the whole process.
    settings = {"set_inductor_config": False}
    scheme = quantization.scheme
    if scheme == "int8":
        config = ao.Int8DynamicActivationInt8WeightConfig(**settings)
    elif scheme == "int8-weights":
        config = ao.Int8WeightOnlyConfig(**settings)
    elif scheme == "int4-weights":
        granularity = ao.PerGroup(quantization.group(weight.shape[1]))
        kind = ao.MappingType.ASYMMETRIC
        bits: Any = getattr(torch, "int4")  # noqa: B009  torch's stubs lack it
        config = ao.IntxWeightOnlyConfig(weight_dtype=bits, granularity=granularity, mapping_type=kind)
    else:
        config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), **settings)
    dtype = torch.bfloat16 if scheme == "fp8" else torch.float32  # torchao's float8 with a scale a row takes no other
    holder = _Holder(weight.to(dtype))
    ao.quantize_(holder, config, lambda module, _name: module is holder)
    return holder.weight


class _Holder(nn.Module):
    """A module whose weight torchao replaces. It registers no parameter.

    While accelerate builds a model without memory, it makes each parameter that a module registers again, by a
    constructor that torchao's tensors do not have.
    """

    weight: Any

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _packed(values: Tensor) -> Tensor:
    """int8 [D', D] with values of -8..7 -> uint8 [D', D/2], the even columns in the low halves."""
    halves = (values + 8).to(torch.uint8)
    return halves[:, 0::2] | (halves[:, 1::2] << 4)


def _unpacked(packed: Tensor) -> Tensor:
    """The inverse of `_packed`."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    return halves.to(torch.int8) - 8

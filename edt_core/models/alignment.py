"""Alignment of a model's weights in memory: on a CPU, results may differ in the last bits with the addresses."""

from itertools import chain
from typing import TypeVar

from torch import nn

ALIGNMENT = 64  # bytes; PyTorch's own allocator aligns every tensor to it

_Module = TypeVar("_Module", bound=nn.Module)


def align_weights(module: _Module) -> _Module:
    """Copy each CPU weight that is not aligned to 64 bytes to aligned memory, in place; return the module.

    MKL chooses the kernels of a matrix product by the addresses of its operands, and guarantees equal bits only for
    aligned ones (oneMKL developer guide, "Obtaining Numerically Reproducible Results"). Libraries that map a
    safetensors file leave its tensors at the file's offsets.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return module

"""Where a model's weights lie in memory: equal weights at other addresses may give other last bits on a CPU."""

from itertools import chain
from typing import TypeVar

from torch import nn

ALIGNMENT = 64  # bytes; PyTorch's own allocator begins every tensor at a multiple of it

_Module = TypeVar("_Module", bound=nn.Module)


def align_weights(module: _Module) -> _Module:
    """Copy each weight on the CPU that does not begin at a multiple of 64 bytes to memory that does; the same module.

    MKL chooses the kernels of a matrix product by the addresses of its operands, and promises equal bits only for
    aligned ones (oneMKL developer guide, "Obtaining Numerically Reproducible Results"). Libraries that map a
    safetensors file leave a tensor wherever the file has it.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return module

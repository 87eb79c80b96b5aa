"""Linear layers on tokens, at the full rate of the processor.

PyTorch uses MKL for float32 products on CPUs. On AMD processors MKL uses its AVX2 kernels even if AVX-512 is
available, at half the rate. oneDNN, which PyTorch uses for convolutions, uses AVX-512 on all processors.

Legend: N = batch, T = tokens, D and D' = widths.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_IMAGES = 16  # with fewer images PyTorch does not use oneDNN for a convolution of 1x1 on a single thread
_MIN_MACS = 1 << 23  # below this the 30 microseconds of preparing a convolution cost more than it saves


def mkl_is_held_back() -> bool:
    """Whether this is an AMD processor with AVX-512, on Linux."""
    if sys.platform != "linux" or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as processors:
        return "AuthenticAMD" in processors.read(200)


_BY_CONVOLUTION = mkl_is_held_back()  # a constant: a call would break torch.compile's graph


def project_tokens(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of tokens, [N, T, D] -> [N, T, D'], as a convolution of 1x1 if that is faster.

    The N·T tokens become the pixels of _IMAGES images in channels-last layout, which needs no copy.
    """
    if not (_BY_CONVOLUTION and _is_faster(x, weight)):
        # Of rows with gaps PyTorch makes one product or one for each image, by whether the weights require gradients.
        return F.linear(x.contiguous(), weight, bias)
    images = x.reshape(_IMAGES, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(images, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:2], -1)


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution is faster for tokens [N, T, D] on a processor with a slow MKL."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_exporting():  # the program may run on another machine
        return False
    if torch.compiler.is_compiling():  # a condition on N would compile another graph for each outcome
        return x.shape[1] % _IMAGES == 0
    rows = x.shape[:2].numel()
    return rows % _IMAGES == 0 and rows * weight.numel() >= _MIN_MACS


class TokenLinear(nn.Linear):
    """A linear layer on tokens, see `project_tokens`."""

    def forward(self, x: Tensor) -> Tensor:
        """Project: [N, T, D] -> [N, T, D']."""
        return project_tokens(x, self.weight, self.bias)

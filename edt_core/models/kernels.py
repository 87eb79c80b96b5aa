"""Linear layers on tokens, at the rate that the processor has.

PyTorch leaves float32 products on CPUs to MKL, which on AMD's processors takes its AVX2 kernels, also where there is
AVX-512: half the rate. oneDNN, which does the convolutions, takes AVX-512 on all.

Legend: N = batch, T = tokens, D and D' = widths.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_IMAGES = 16  # with fewer PyTorch does not give a convolution of 1x1 to oneDNN on a single thread
_MIN_MACS = 1 << 23  # below this a convolution's 30 microseconds of preparation are more than it saves


def mkl_is_held_back() -> bool:
    """Whether this is an AMD processor with AVX-512, on Linux."""
    if sys.platform != "linux" or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as processors:
        return "AuthenticAMD" in processors.read(200)


_BY_CONVOLUTION = mkl_is_held_back()  # a constant: torch.compile would break its graph at a question


def project_tokens(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of tokens, [N, T, D] -> [N, T, D'], as a convolution of 1x1 where that is faster.

    Tokens are the pixels of images of channels last, which needs no copy. All N·T of them are cut into _IMAGES images,
    whatever N is.
    """
    if not (_BY_CONVOLUTION and _is_faster(x, weight)):
        return F.linear(x, weight, bias)
    images = x.reshape(_IMAGES, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(images, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:2], -1)


def _is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether to convolve tokens [N, T, D] where MKL is held back."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_exporting():  # for other machines than this one
        return False
    if torch.compiler.is_compiling():  # for each answer to a question about N a graph would be compiled
        return x.shape[1] % _IMAGES == 0
    rows = x.shape[:2].numel()
    return rows % _IMAGES == 0 and rows * weight.numel() >= _MIN_MACS


class TokenLinear(nn.Linear):
    """A linear layer on tokens, see `project_tokens`."""

    def forward(self, x: Tensor) -> Tensor:
        """Project: [N, T, D] -> [N, T, D']."""
        return project_tokens(x, self.weight, self.bias)

"""Floating-point precision of a process."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch


def use_precision(precision: str) -> torch.dtype:
    """Set this process to "fp32", "tf32", "fp16" or "bf16"; return the dtype for a model's weights.

    By default, a GPU convolves float32 in TF32, with ten bits of mantissa instead of twenty-three. A CPU computes
    float32 exactly in every precision.
    """
    _set_products(tf32=precision == "tf32")
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


@contextmanager
def exact_products() -> Iterator[None]:
    """Context of float32 products and convolutions without TF32 or bfloat16; restores the settings afterwards."""
    backends = _backends()
    precisions = [backend.fp32_precision for backend in backends]
    matmul = cudnn = None
    with suppress(RuntimeError):  # raised if other code has set only one of the two names
        matmul = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        cudnn = torch.backends.cudnn.allow_tf32
    try:
        _set_products(tf32=False)
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            torch.backends.cudnn.allow_tf32 = cudnn
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision


def _set_products(*, tf32: bool) -> None:
    """Set TF32 for CUDA by both generations of names: PyTorch raises where code reads the one that was not set.

    The older name of the matrix products also sets those of a CPU, which are set back to float32: their bits would
    depend on the processor.
    """
    mode = "tf32" if tf32 else "ieee"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    matmul, *convolutions, cpu_convolution, cpu_matmul = _backends()
    for backend in (matmul, *convolutions):
        backend.fp32_precision = mode
    for backend in (cpu_convolution, cpu_matmul):
        backend.fp32_precision = "ieee"


def _backends() -> list[Any]:
    """Settings by their newer names: products, convolutions and recurrent networks on CUDA, then those on a CPU."""
    cudnn, mkldnn = cast(Any, torch.backends.cudnn), cast(Any, torch.backends.mkldnn)
    return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.conv, mkldnn.matmul]

"""Floating-point precision of a process."""

from typing import Any

import torch


def use_precision(precision: str) -> torch.dtype:
    """Set this process to "fp32", "tf32", "fp16" or "bf16"; return the dtype for a model's weights.

    By default, a GPU convolves float32 in TF32, with ten bits of mantissa instead of twenty-three.
    """
    mode = "tf32" if precision == "tf32" else "ieee"
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = mode == "tf32"  # the older name of both below: torch.export rejects conflicting values
    cudnn.conv.fp32_precision = mode
    cudnn.rnn.fp32_precision = mode
    torch.backends.cuda.matmul.fp32_precision = mode
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)

"""How a process computes."""

from typing import Any

import torch


def use_precision(precision: str) -> torch.dtype:
    """Set how this process computes in "fp32", "tf32", "fp16" or "bf16"; returns the dtype for a model's weights.

    A GPU convolves float32 in TF32 unless told otherwise, ten bits of mantissa for twenty-three.
    """
    mode = "tf32" if precision == "tf32" else "ieee"
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = mode == "tf32"  # the older name of both below: torch.export refuses three that differ
    cudnn.conv.fp32_precision = mode
    cudnn.rnn.fp32_precision = mode
    torch.backends.cuda.matmul.fp32_precision = mode
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)

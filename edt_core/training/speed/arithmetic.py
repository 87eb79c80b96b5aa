"""How a model computes in a training, which its held-out loss must share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edt_core.models import DiffusionTransformer
from edt_core.training.speed.attention_table import attention_forms

if TYPE_CHECKING:
    from edt_core.config import TrainConfig


def set_arithmetic(model: DiffusionTransformer, config: TrainConfig) -> None:
    """Set the dtype of the tokens between blocks, and the forms of attention. Raises UserError for a bad table."""
    model.stream_dtype = torch.bfloat16 if config.residual_dtype == "bf16" else None
    model.set_attention_forms(attention_forms(config))

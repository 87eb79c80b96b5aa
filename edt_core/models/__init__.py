"""EDT, the Efficient Diffusion Transformer (arXiv 2410.23788), and what training and sampling ask of it."""

from edt_core.models.config import AmmKernel, ModelConfig, StageSpec
from edt_core.models.cost import count_macs, count_parameters, shadow
from edt_core.models.edt import EDT
from edt_core.models.masking import MaskSite, draw_mask_ratios, draw_masks, mask_sites, slice_masks
from edt_core.models.positions import amm_matrix
from edt_core.models.released import load_released
from edt_core.models.zoo import MODEL_NAMES, create_model, model_config, paper_amm_blocks

__all__ = [
    "EDT",
    "MODEL_NAMES",
    "AmmKernel",
    "MaskSite",
    "ModelConfig",
    "StageSpec",
    "amm_matrix",
    "count_macs",
    "count_parameters",
    "create_model",
    "draw_mask_ratios",
    "draw_masks",
    "load_released",
    "mask_sites",
    "model_config",
    "paper_amm_blocks",
    "shadow",
    "slice_masks",
]

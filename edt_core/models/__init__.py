"""The models (EDT, arXiv 2410.23788, and other diffusion transformers), for training and sampling."""

from edt_core.models.base import DiffusionTransformer
from edt_core.models.config import AmmKernel, ModelConfig
from edt_core.models.cost import PartCost, count_macs, count_parameters, macs_by_part, macs_of, shadow, training_flops
from edt_core.models.families import FAMILIES
from edt_core.models.families.dit import DiT, DiTConfig
from edt_core.models.families.edt import EDT, EDTConfig, StageSpec
from edt_core.models.families.mdtv2 import MDTv2, MDTv2Config
from edt_core.models.import_released import load_released, read_released_model
from edt_core.models.mask_form import MaskSite
from edt_core.models.masking import check_masked_loss, draw_mask_ratios, draw_masks, mask_sites, masks_of, slice_masks
from edt_core.models.positions import amm_matrix
from edt_core.models.zoo import (
    DIFFUSION_NAMES,
    MODEL_NAMES,
    build_model,
    chosen_amm_blocks,
    create_model,
    has_paper_amm_blocks,
    model_config,
    models_for,
    overrides_record,
    paper_amm_blocks,
    with_trained_amm,
)

__all__ = [
    "DIFFUSION_NAMES",
    "EDT",
    "FAMILIES",
    "MODEL_NAMES",
    "AmmKernel",
    "DiT",
    "DiTConfig",
    "DiffusionTransformer",
    "EDTConfig",
    "MDTv2",
    "MDTv2Config",
    "MaskSite",
    "ModelConfig",
    "PartCost",
    "StageSpec",
    "amm_matrix",
    "build_model",
    "check_masked_loss",
    "chosen_amm_blocks",
    "count_macs",
    "count_parameters",
    "create_model",
    "draw_mask_ratios",
    "draw_masks",
    "has_paper_amm_blocks",
    "load_released",
    "macs_by_part",
    "macs_of",
    "mask_sites",
    "masks_of",
    "model_config",
    "models_for",
    "overrides_record",
    "paper_amm_blocks",
    "read_released_model",
    "shadow",
    "slice_masks",
    "training_flops",
    "with_trained_amm",
]

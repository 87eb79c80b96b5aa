"""The placements of AMM that EDT's authors publish; each family lists those of its models."""

import math
from dataclasses import dataclass

ANY_SCALE = (1.0, math.inf)
LARGE_IMAGE_SIZE = 512  # from this image size on, other blocks and another kernel are published


@dataclass(frozen=True)
class AmmPlacement:
    """Blocks whose attention EDT's authors modulate in a model, 0-based and in forward order.

    It applies to guidance scales from `cfg_scales[0]` to `cfg_scales[1]`, both included. `large`: for images of at
    least `LARGE_IMAGE_SIZE` pixels; otherwise it is published for 256 pixels, and used for every smaller size too.
    """

    model: str
    blocks: tuple[int, ...]
    cfg_scales: tuple[float, float]
    source: str  # a file of github.com/xinwangChen/EDT
    large: bool = False

    def fits(self, model: str, cfg_scale: float, image_size: int) -> bool:
        """Whether the placement is published for this model, guidance scale and image size."""
        low, high = self.cfg_scales
        return self.model == model and self.large == (image_size >= LARGE_IMAGE_SIZE) and low <= cfg_scale <= high

    def __str__(self) -> str:
        low, high = self.cfg_scales
        scale = f"{low:g}" if low == high else f"from {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        size = f"at least {LARGE_IMAGE_SIZE}" if self.large else f"less than {LARGE_IMAGE_SIZE}"
        return f"blocks {list(self.blocks)} for cfg_scale {scale} and {size} px"

"""Where EDT's authors modulate attention, as the files of github.com/xinwangChen/EDT state it."""

import math
from dataclasses import dataclass

EDT_CODE = "github.com/xinwangChen/EDT"
LARGE_IMAGE_SIZE = 512  # from this image size on, another block, with another kernel


@dataclass(frozen=True)
class AmmPlacement:
    """Blocks whose attention EDT's authors modulate in a model, 0-based and in forward order.

    It holds for guidance scales from `cfg_scales[0]` to `cfg_scales[1]`, both included. `large`: for images of at least
    `LARGE_IMAGE_SIZE` pixels; otherwise it is for 256 pixels, and used for every size below `LARGE_IMAGE_SIZE`.
    """

    model: str
    blocks: tuple[int, ...]
    cfg_scales: tuple[float, float]
    source: str  # a file of EDT_CODE
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


_EDT_FILE, _DIT_FILE, _MDT_FILE = (
    "models_edt.py",
    "other_models/models_dit_with_amm.py",
    "other_models/models_mdt_with_amm.py",
)
_ANY_SCALE = (1.0, math.inf)
# The files give settings as comments. EDT-S and -B share theirs: [7, 10] "when cfg=1, cfg=1.25 or cfg=1.5", [8] "when
# cfg=2 or cfg>=3"; scales between 1.5 and 2 count as 1.5. The comment on 512 px names EDT-S alone, and the file says
# that S and B have the same arrangement. For XL no scale is named. The file has a second line for XL, block 24 alone,
# without any condition; it is not used here. DiT and MDTv2 have no line for 512 px.
AMM_PLACEMENTS: tuple[AmmPlacement, ...] = (  # the first one that fits counts
    *(
        placement
        for model in ("EDT-S/2", "EDT-B/2")
        for placement in (
            AmmPlacement(model, (8,), (2.0, math.inf), _EDT_FILE),
            AmmPlacement(model, (7, 10), (1.0, 2.0), _EDT_FILE),
            AmmPlacement(model, (10,), _ANY_SCALE, _EDT_FILE, large=True),
        )
    ),
    AmmPlacement("EDT-XL/2", (23, 25), _ANY_SCALE, _EDT_FILE),
    AmmPlacement("DiT-S/2", (8, 10), (1.0, 1.5), _DIT_FILE),  # "when cfg=1 or cf=1.5"
    AmmPlacement("DiT-XL/2", (15, 17, 19, 22, 24), (1.0, 1.0), _DIT_FILE),  # 400k and 7000k steps, "when cfg=1"
    AmmPlacement("MDTv2-S/2", (8,), (1.0, 3.8), _MDT_FILE),  # 400k steps, "when cfg=1 or cfg=3.8" (power-cosine)
)

"""What papers and their code state: cost of a forward pass, FID on ImageNet, and where attention is modulated.

FID is FID-50k with ADM's statistics, 250 ancestral steps and labels drawn uniformly. Values are only comparable with
others of that protocol. EDT's rows are also in the README of github.com/xinwangChen/EDT, and MDTv2's 1.58 in that of
github.com/sail-sg/MDT.
"""

import math
from dataclasses import dataclass

EDT_PAPER, DIT_PAPER, MDT_PAPER = "arXiv 2410.23788", "arXiv 2212.09748", "arXiv 2303.14389"
EDT_CODE = "github.com/xinwangChen/EDT"
AUTOENCODER = "stabilityai/sd-vae-ft-ema"  # of the published checkpoints of all three papers
AUTOENCODER_FACTOR, AUTOENCODER_CHANNELS = 8, 4
LARGE_IMAGE_SIZE = 512  # from this image size on, EDT's authors modulate another block, with another kernel


@dataclass(frozen=True)
class Published:
    """One row of a paper's table. `gflops` are multiply-accumulates / 1e9, None where the paper does not state them."""

    source: str
    model: str
    steps: int  # of 256 images
    fid: float
    gflops: float | None = None
    guided: bool = False
    image_size: int = 256

    @property
    def images_seen(self) -> int:
        return self.steps * 256


_K = 1000
_DIT_400K = {  # table 4: Gflops, FID
    "DiT-S/8": (0.36, 153.60),
    "DiT-S/4": (1.41, 100.41),
    "DiT-S/2": (6.06, 68.40),
    "DiT-B/8": (1.42, 122.74),
    "DiT-B/4": (5.56, 68.38),
    "DiT-B/2": (23.01, 43.47),
    "DiT-L/8": (5.01, 118.87),
    "DiT-L/4": (19.70, 45.64),
    "DiT-L/2": (80.71, 23.33),
    "DiT-XL/8": (7.39, 106.41),
    "DiT-XL/4": (29.05, 43.01),
    "DiT-XL/2": (118.64, 19.47),
}

PUBLISHED: tuple[Published, ...] = (
    Published(EDT_PAPER, "EDT-S/2", 400 * _K, 34.27, 2.66),
    Published(EDT_PAPER, "EDT-B/2", 400 * _K, 19.18, 10.20),
    Published(EDT_PAPER, "EDT-B/2", 1000 * _K, 13.58, 10.20),
    Published(EDT_PAPER, "EDT-XL/2", 400 * _K, 7.52, 51.83),
    Published(EDT_PAPER, "EDT-XL/2", 2000 * _K, 3.54, 51.83, guided=True),
    *(Published(DIT_PAPER, model, 400 * _K, fid, gflops) for model, (gflops, fid) in _DIT_400K.items()),
    Published(DIT_PAPER, "DiT-XL/2", 7000 * _K, 9.62, 118.64),
    Published(DIT_PAPER, "DiT-XL/2", 7000 * _K, 2.27, 118.64, guided=True),
    Published(DIT_PAPER, "DiT-XL/2", 3000 * _K, 12.03, 524.60, image_size=512),
    Published(DIT_PAPER, "DiT-XL/2", 3000 * _K, 3.04, 524.60, guided=True, image_size=512),
    Published(MDT_PAPER, "MDTv2-S/2", 400 * _K, 39.50),
    Published(MDT_PAPER, "MDTv2-B/2", 400 * _K, 19.55),
    Published(MDT_PAPER, "MDTv2-XL/2", 400 * _K, 7.70),
    Published(MDT_PAPER, "MDTv2-XL/2", 4600 * _K, 1.58, guided=True),
)


def published_gflops(model: str, image_size: int) -> float | None:
    """Multiply-accumulates of a forward pass / 1e9 as the model's paper has them, or None."""
    found = (row.gflops for row in PUBLISHED if (row.model, row.image_size) == (model, image_size))
    return next(found, None)


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

"""Published values of the papers: cost of a forward pass, and FID on ImageNet.

FID is FID-50k with ADM's statistics, 250 ancestral steps and labels drawn uniformly. Values are only comparable with
others of that protocol. EDT's rows are also in the README of github.com/xinwangChen/EDT, and MDTv2's 1.58 in that of
github.com/sail-sg/MDT.
"""

from dataclasses import dataclass

EDT_PAPER, DIT_PAPER, MDT_PAPER = "arXiv 2410.23788", "arXiv 2212.09748", "arXiv 2303.14389"
AUTOENCODER = "stabilityai/sd-vae-ft-ema"  # of the published checkpoints of all three papers
AUTOENCODER_FACTOR, AUTOENCODER_CHANNELS = 8, 4


@dataclass(frozen=True)
class Published:
    """One row of a paper's table. `gflops` are multiply-accumulates / 1e9, None if the paper does not state them."""

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
    """Multiply-accumulates of a forward pass / 1e9 from the model's paper, or None."""
    values = (row.gflops for row in PUBLISHED if (row.model, row.image_size) == (model, image_size))
    return next(values, None)

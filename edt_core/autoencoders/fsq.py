"""AutoencoderFSQ: an autoencoder whose latents are codes of finite scalar quantization (arXiv 2309.15505).

Encoder and decoder are those of diffusers' AutoencoderKL. diffusers has no such class, so this one is loaded from the
package, and named in stored folders by `edt_core.pipeline`.

Legend: N images, S image side in pixels, h latent side (S / downsample factor).
"""

from collections.abc import Sequence

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from edt_core.models.families.codes import LEVELS, quantized


class AutoencoderFSQ(ModelMixin, ConfigMixin):
    """Images -> values of codes, exact in every floating-point format -> images.

    `levels` and `scaling_factor` are constants that `edt_core.autoencoders.kinds.fsq` checks: the values are latents of
    the model as they are.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = len(LEVELS),
        levels: Sequence[int] = LEVELS,
        block_out_channels: Sequence[int] = (32, 64, 128),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        shared = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
        }
        count = len(block_out_channels)
        self.encoder = Encoder(in_channels, latent_channels, ("DownEncoderBlock2D",) * count, double_z=False, **shared)
        self.decoder = Decoder(latent_channels, out_channels, ("UpDecoderBlock2D",) * count, **shared)

    def encode(self, images: Tensor) -> Tensor:
        """Values [N, 4, h, h] of images [N, 3, S, S] in -1..1."""
        return quantized(self.encoder(images))

    def decode(self, values: Tensor) -> DecoderOutput:
        """Images [N, 3, S, S] in about -1..1, as `sample` of the result, of values [N, 4, h, h]."""
        return DecoderOutput(sample=self.decoder(values))

    def forward(self, images: Tensor) -> Tensor:
        """Images encoded and decoded; the gradient passes through the rounding."""
        return self.decode(self.encode(images)).sample


AutoencoderFSQ.__module__ = "edt_core.pipeline"  # named in model_index.json, independent of where the code is

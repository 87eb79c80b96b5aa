"""Latent shards: the posteriors of an image and of its mirror image, one Arrow row per image.

Format: Arrow IPC *file* format, never the stream format (a stream cut at a message boundary ends early silently).
Columns: `key` string, `label` int64, and `posterior`, `mirror_posterior`, fixed-size lists float32[2*C*h*h]: mean, then
std, of the autoencoder before scaling. Record batches have LATENT_ROWS_PER_BATCH rows, the last one the rest. The
schema's metadata records autoencoder, scale (see `edt_core.data.scale`), image size, latent shape and source shard.

In half precision the lists have float16 numbers, or uint16 with the bits of bfloat16, and a column `rounding`,
float32[2*C]: of each row the largest error of its means, then of its stds, by channel, over both sides.
"""

from edt_core.data.latents.dataset import LatentDataset
from edt_core.data.latents.layout import LatentInfo, latent_schema
from edt_core.data.latents.number_format import NUMBER_FORMATS, NumberFormat
from edt_core.data.latents.shard import LatentRow, LatentShard, LatentShardWriter, write_latent_tar

__all__ = [
    "NUMBER_FORMATS",
    "LatentDataset",
    "LatentInfo",
    "LatentRow",
    "LatentShard",
    "LatentShardWriter",
    "NumberFormat",
    "latent_schema",
    "write_latent_tar",
]

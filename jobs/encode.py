"""encode: image shards -> Arrow latent shards (posterior of image and mirror image) and their WebDataset twins."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edt_core.artifact import Artifact, ArtifactWriter
from edt_core.config import EncodeConfig
from edt_core.errors import UserError
from edt_core.progress import Progress
from edt_core.schema import LATENT_SHARD, LATENT_TAR_SHARD
from jobs.autoencoder import FOLDER, IMAGE_SHARDS
from jobs.cluster import device_name, pooled, require, use_threads
from jobs.verb import Verb


class Encoder:
    """Loads the autoencoder once, then turns one image shard after the other into a latent shard."""

    def __init__(
        self,
        config: EncodeConfig,
        inputs: Mapping[str, Artifact],
        out: ArtifactWriter,
        device: str | None = None,
    ) -> None:
        from edt_core.autoencoder import load_autoencoder
        from edt_core.data.latents import LatentInfo

        use_threads(config.num_cpus_per_worker)
        self.config, self.images, self.out = config, inputs["images"], out
        source = inputs["autoencoder"]
        self.model = load_autoencoder(source.directory(FOLDER), device or device_name(config.num_gpus_per_worker))
        size, factor = self.images.counts["image_size"], source.counts["downsample_factor"]
        self.info = LatentInfo(
            autoencoder=f"{source.counts['source']}@{source.manifest.digest}",
            scaling_factor=source.counts["scaling_factor"],
            image_size=size,
            latent_shape=(source.counts["latent_channels"], size // factor, size // factor),
        )

    def work(self, shard: int) -> tuple[int, list[float], list[float]]:
        """Encode shard number `shard`: rows, and sum and sum of squares of the latents by channel."""
        from dataclasses import replace

        from edt_core.data.latents import LatentShard, write_latent_shard, write_latent_tar

        source = self.images.entries(IMAGE_SHARDS)[shard]
        name, twin = LATENT_SHARD.format(shard), LATENT_TAR_SHARD.format(shard)
        if self.out.recover(name) and (not self.config.write_webdataset or self.out.recover(twin)):
            rows = LatentShard(self.out.data.local_copy(name)).rows()
        else:
            rows = self._encode(self.images.path(source.path), source.rows)
            info = replace(self.info, source_shard=source.path)
            self.out.write(name, lambda path: write_latent_shard(path, rows, info))
            if self.config.write_webdataset:
                self.out.write(twin, lambda path: write_latent_tar(path, rows))
        mean, std = (rows.posterior[:, i].astype(np.float64) for i in (0, 1))
        return len(rows.keys), mean.sum((0, 2, 3)).tolist(), (mean**2 + std**2).sum((0, 2, 3)).tolist()

    def _encode(self, path: Path, expected: int | None) -> Any:
        from edt_core.autoencoder import encode_posterior
        from edt_core.data.latents import LatentRows
        from edt_core.data.shards import read_image_shard

        samples = list(read_image_shard(path))
        if len(samples) != expected:
            raise UserError(f"{path} holds {len(samples)} images, its manifest says {expected}; run preprocess again")
        parts = []
        for start in range(0, len(samples), self.config.batch_size):
            pixels = np.stack([sample.pixels() for sample in samples[start : start + self.config.batch_size]])
            sides = [encode_posterior(self.model, view) for view in (pixels, np.ascontiguousarray(pixels[:, :, ::-1]))]
            parts.append(np.stack([part.cpu().numpy() for side in sides for part in side], axis=1))
        posterior = np.concatenate(parts) if parts else np.empty((0, 4, *self.info.latent_shape), np.float32)
        if not np.isfinite(posterior).all():
            raise UserError(f"the autoencoder gives latents of {path} that are not finite; encode in fp32")
        labels = np.array([sample.label for sample in samples], dtype=np.int64)
        return LatentRows(tuple(sample.key for sample in samples), labels, posterior)


def encode(
    config: EncodeConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Encode every shard of `inputs["images"]` with `inputs["autoencoder"]`.

    The counts hold mean and standard deviation by channel of the raw latents, posterior variance included.
    """
    shards = len(inputs["images"].entries(IMAGE_SHARDS))
    resources = {"num_cpus": config.num_cpus_per_worker, "num_gpus": config.num_gpus_per_worker}
    require("encode", CPU=config.num_cpus_per_worker, GPU=config.num_gpus_per_worker)
    parts: dict[int, tuple[int, list[float], list[float]]] = {}
    for shard, part in pooled(Encoder, config.num_workers, range(shards), config, dict(inputs), out, **resources):
        parts[shard] = part
        progress.update(len(parts), shards, "shards")
    # In order of shard: sums of floats hang on their order, and the manifest must not hang on who was first.
    rows = sum(parts[shard][0] for shard in range(shards))
    total, squares = (np.sum([parts[shard][i] for shard in range(shards)], axis=0) for i in (1, 2))
    images, source = inputs["images"], inputs["autoencoder"]
    if rows != images.counts["images"]:
        raise UserError(
            f"encoded {rows} images, the image shards state {images.counts['images']}; run preprocess again"
        )
    side = images.counts["image_size"] // source.counts["downsample_factor"]
    mean = total / (rows * side * side)
    return {
        "images": rows,
        "classes": images.counts["classes"],
        "image_size": images.counts["image_size"],
        "latent_shape": [source.counts["latent_channels"], side, side],
        "scaling_factor": source.counts["scaling_factor"],
        "autoencoder_digest": source.manifest.digest,
        "channel_mean": mean.tolist(),
        "channel_std": np.sqrt(squares / (rows * side * side) - mean**2).tolist(),
    }


VERB = Verb("encode", "latents", 1, EncodeConfig, encode, roles=("images", "autoencoder"))

if __name__ == "__main__":
    VERB.main()

"""encode: image shards -> Arrow latent shards (posterior of image and mirror image), WebDataset twins on request."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.config import EncodeConfig
from edt_core.cpu_units import whole_units
from edt_core.data.prefetch import in_batches
from edt_core.data.shards import ImageSample, read_image_shard
from edt_core.errors import UserError
from edt_core.evaluation.extractors import TOKEN_SPACES
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter, FileEntry
from edt_core.store.cache import local_copy
from edt_core.store.folder import sha256_file
from edt_core.store.layout import LATENT_SHARD, LATENT_TAR_SHARD, LATENT_TOKENS
from jobs.runtime.cluster import require, use_threads
from jobs.runtime.devices import device_name, kind_of_devices
from jobs.runtime.pool import pooled
from jobs.stages import extractors
from jobs.stages.autoencoder import FOLDER, IMAGE_SHARDS, stored_scale
from jobs.stages.reuse.latents import GPU_TOLERANCE, Batch, ShardImages, earlier_latents, merged_rows
from jobs.stages.reuse.siblings import (
    Places,
    WrongRowError,
    checked_rows,
    discard_files,
    message_of,
    reuse_record,
)
from jobs.stages.stage import DEVICE, REUSED, Stage

_PROBES = 16  # images for measuring the error of a lower precision, independent of the batch size
_AHEAD = 3  # decoded batches that wait for the autoencoder


class Encoder:
    """Loads the autoencoder once, then turns image shards into latent shards, one by one."""

    def __init__(
        self,
        config: EncodeConfig,
        inputs: Mapping[str, Artifact],
        out: ArtifactWriter,
        progress: Progress,
        device: str | None = None,
        earlier: Sequence[Places | None] = (),
    ) -> None:
        from edt_core.autoencoders.autoencoder import load_autoencoder
        from edt_core.data.latents import LatentInfo
        from edt_core.precision import use_precision

        use_threads(config.num_cpus_per_worker)
        self.config, self.images, self.out, self.progress = config, inputs["images"], out, progress
        self.earlier = earlier
        source = inputs["autoencoder"]
        self.location = source.directory(FOLDER)
        self.device = device or device_name(config.num_gpus_per_worker)
        self.model: Any = load_autoencoder(self.location, self.device).to(use_precision(config.precision))
        self.tokens = extractors.load_tokens(inputs, self.device)
        size, factor = self.images.counts["image_size"], source.counts["downsample_factor"]
        self.info = LatentInfo(
            autoencoder=f"{source.counts['source']}@{source.manifest.digest}",
            scale=stored_scale(source),
            image_size=size,
            latent_shape=(source.counts["latent_channels"], size // factor, size // factor),
            store=config.store,
        )

    def work(self, shard: int) -> dict[str, Any]:
        """Encode shard number `shard`; return its rows and labels, sums and sums of squares of latents by channel, and
        the largest rounding errors of means and stds, [2, C].

        The result has the device too, and for shard 0 the error of a precision below fp32. A wrong row of earlier
        latents is returned and not raised: an error would end the other workers, one of which may be writing a shard.
        """
        try:
            return self._encode(shard)
        except WrongRowError as error:
            return {"wrong": str(error), "rows": 0}

    def _encode(self, shard: int) -> dict[str, Any]:
        from dataclasses import replace

        from edt_core.data.latents import LatentShard, LatentShardWriter, write_latent_tar
        from edt_core.data.latents.statistics import channel_sums

        source = self.images.entries(IMAGE_SHARDS)[shard]
        name, twin = LATENT_SHARD.format(shard), LATENT_TAR_SHARD.format(shard)
        if not (is_recovered := bool(self.out.recover(name))):

            def write_to(path: Path) -> int:
                with LatentShardWriter(path, replace(self.info, source_shard=source.path)) as writer:
                    for batch in self._rows(shard, source):
                        writer.write(*batch)
                return writer.rows

            self.out.write(name, write_to)
        latents = LatentShard(local_copy(self.out.data, name))
        if self.config.write_webdataset and not self.out.recover(twin):
            self.out.write(twin, lambda path: write_latent_tar(path, latents))
        tokens = self._tokens(shard, source)
        if len(latents) != source.rows:
            raise UserError(
                f"{source.path} contains {len(latents)} images, but its manifest says {source.rows}; "
                "run preprocess again"
            )
        return {
            "rows": len(latents),
            "recovered": is_recovered,
            "device": self.device,
            **channel_sums(latents),
            "rounding": latents.rounding.max(axis=0, initial=0.0),
            "labels": np.bincount(latents.labels, minlength=self.images.counts["classes"]),
            "error": self._precision_error(source) if shard == 0 else None,
            "tokens": tokens,
        }

    def _tokens(self, shard: int, source: FileEntry) -> list[int] | None:
        """Write the tokens of a shard's images, if asked for, and return their number and width."""
        from edt_core.data.latents.tokens import write_tokens

        if self.tokens is None:
            return None
        network, name, rows = self.tokens, LATENT_TOKENS.format(shard), source.rows or 0

        def write_to(path: Path) -> int:
            with ThreadPoolExecutor(self.config.num_decode_threads) as pool:
                batches = (pixels for _, pixels in self._decoded(source, pool, None))
                return write_tokens(path, batches, rows, network)

        if not self.out.recover(name):
            self.out.write(name, write_to)
        return list(np.load(local_copy(self.out.data, name), mmap_mode="r", allow_pickle=False).shape[2:])

    def _rows(self, shard: int, source: FileEntry) -> Iterator[Batch]:
        """All rows of a shard in order, batch by batch: encoded, or taken from earlier latents."""
        places = self.earlier[shard] if self.earlier else None
        if places is None:
            yield from self._encoded(shard, source)
            return
        read = ~places.reused | checked_rows(places.reused, self.out.fingerprint, shard)
        gap = 0.0 if self.device == "cpu" else GPU_TOLERANCE[self.config.precision]
        encoded = (row for batch in self._encoded(shard, source, read) for row in batch.posterior)
        with ShardImages(self.images.path(source.path)) as images:
            if len(images) == len(read):  # otherwise `work` refuses the shard
                yield from merged_rows(images, places, read, encoded, gap)

    def _encoded(self, shard: int, source: FileEntry, wanted: NDArray[np.bool_] | None = None) -> Iterator[Batch]:
        """The rows of a shard, all or those that are wanted, encoded batch by batch."""
        from edt_core.autoencoders.autoencoder import encode_both_sides
        from edt_core.data.prefetch import prefetched

        done = 0
        with ThreadPoolExecutor(self.config.num_decode_threads) as pool:
            ahead = prefetched(self._decoded(source, pool, wanted), _AHEAD)
            for samples, posterior in encode_both_sides(self.model, ahead):
                if not np.isfinite(posterior).all():
                    exact = self.config.precision == "fp32"
                    remedy = (
                        "its weights are damaged or do not match its configuration"
                        if exact
                        else "set encode.precision=fp32"
                    )
                    raise UserError(
                        f"the autoencoder's latents of {source.path} are not finite in {self.config.precision}; "
                        f"{remedy}"
                    )
                labels = np.array([sample.label for sample in samples], dtype=np.int64)
                yield Batch([sample.key for sample in samples], labels, posterior)
                done += len(samples)
                self.progress.update(done, self.images.counts["images"], "images", part=shard)

    def _decoded(
        self, source: FileEntry, pool: ThreadPoolExecutor, wanted: NDArray[np.bool_] | None
    ) -> Iterator[tuple[tuple[ImageSample, ...], NDArray[np.uint8]]]:
        """Batches of a shard's samples and their pixels, uint8 [n, S, S, 3]. Checks the digest of the shard first."""
        path = self.images.path(source.path)
        if sha256_file(path) != source.sha256:
            raise UserError(f"{path} does not match its manifest (another sha256); run preprocess again")
        size = whole_units(self.config.batch_size) if self.device == "cpu" else self.config.batch_size
        with ShardImages(path) if wanted is not None else nullcontext() as images:
            rows = [] if wanted is None else np.flatnonzero(wanted).tolist()
            chosen = read_image_shard(path) if images is None else images.samples(rows)
            for samples in in_batches(chosen, size):
                yield samples, np.stack(list(pool.map(ImageSample.pixels, samples)))

    def _precision_error(self, source: FileEntry) -> dict[str, float] | None:
        from edt_core.autoencoders.autoencoder import load_autoencoder, precision_error

        if self.config.precision == "fp32" or not source.rows:
            return None
        first = islice(read_image_shard(self.images.path(source.path)), _PROBES)
        exact = load_autoencoder(self.location, self.device)
        pixels = np.stack([sample.pixels() for sample in first])
        return precision_error(self.model, exact, pixels, self.config.precision)


def encode(
    config: EncodeConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Encode image shards into latent shards: the autoencoder's posterior of each image and its mirror image.

    Makes one latent shard for each shard of `inputs["images"]`, with `inputs["autoencoder"]`.
    The counts contain mean and standard deviation by channel of the raw latents, posterior variance included, and the
    largest errors of half precision. With a feature network of `TOKEN_SPACES` among the inputs, the tokens of each
    image and its mirror image are written too.
    Raises UserError if the image size does not fit the autoencoder, or a shard does not match its manifest.
    """
    from edt_core.data.latents.statistics import deviation, store_error

    images, source = inputs["images"], inputs["autoencoder"]
    size, factor = images.counts["image_size"], source.counts["downsample_factor"]
    if size % factor:
        raise UserError(
            f"images of {size} px do not fit an autoencoder that divides the side by {factor}; set "
            f"preprocess.image_size to a multiple of {factor}"
        )
    require("encode", CPU=config.num_cpus_per_worker, GPU=config.num_gpus_per_worker)
    shards = range(len(images.entries(IMAGE_SHARDS)))
    earlier = earlier_latents(out, config, STAGE.version, images, source)
    try:
        parts = _encode_shards(config, inputs, out, progress, earlier)
    except WrongRowError as wrong:
        progress.warn(f"no row of earlier latents is reused, all images are encoded: {message_of(wrong)}")
        discard_files(out, [name.format(k) for k in shards for name in (LATENT_SHARD, LATENT_TAR_SHARD)])
        parts = _encode_shards(config, inputs, out, progress, [])
        earlier = []
    made = {k: places for k, places in enumerate(earlier) if places is not None and not parts[k]["recovered"]}
    reused = reuse_record(made, out.fingerprint)
    rows = sum(part["rows"] for part in parts.values())
    if rows != images.counts["images"]:
        raise UserError(
            f"encoded {rows} images, but the image shards state {images.counts['images']}; run preprocess again"
        )
    side = size // factor
    # In order of shard: sums of floats depend on their order, and the manifest must not depend on the workers' timing.
    mean, square = (sum(parts[k][name] for k in shards) / (rows * side * side) for name in ("total", "squares"))
    deviations, stored = deviation(mean, square), dict[str, Any]()
    if config.store != "fp32":
        stored = {"store": config.store, "store_error": store_error([parts[k]["rounding"] for k in shards], deviations)}
    if error := parts[0]["error"]:
        progress.warn(
            f"{config.precision} changes the latents by {error['rms']:.2e} (rms) and {error['max']:.2e} (maximum) of "
            "their standard deviation, compared with fp32"
        )
    return {
        "images": rows,
        "classes": images.counts["classes"],
        "class_counts": sum(part["labels"] for part in parts.values()).tolist(),
        "image_size": size,
        "latent_shape": [source.counts["latent_channels"], side, side],
        **stored_scale(source).record(),
        "autoencoder_digest": source.manifest.digest,
        **({"levels": source.counts["levels"]} if "levels" in source.counts else {}),
        "channel_mean": mean.tolist(),
        "channel_std": deviations.tolist(),
        **stored,
        **({"precision_error": error} if error else {}),
        **({"tokens": parts[0]["tokens"]} if parts[0]["tokens"] else {}),
        **({REUSED: reused} if reused else {}),
        DEVICE: kind_of_devices(parts[k]["device"] for k in shards),
    }


def _encode_shards(
    config: EncodeConfig,
    inputs: Mapping[str, Artifact],
    out: ArtifactWriter,
    progress: Progress,
    earlier: Sequence[Places | None],
) -> dict[int, dict[str, Any]]:
    """What `Encoder.work` returns, for each image shard."""
    images = inputs["images"]
    shards = range(len(images.entries(IMAGE_SHARDS)))
    resources: dict[str, Any] = {"num_cpus": config.num_cpus_per_worker, "num_gpus": config.num_gpus_per_worker}
    arguments = (config, dict(inputs), out, progress, None, earlier)
    parts: dict[int, dict[str, Any]] = {}
    for shard, part in pooled(Encoder, config.num_workers, shards, *arguments, **resources):
        parts[shard] = part
        progress.update(part["rows"], images.counts["images"], "images", part=shard)
    if problems := [part["wrong"] for part in parts.values() if "wrong" in part]:
        raise WrongRowError(problems[0])
    return parts


STAGE = Stage(
    "encode",
    "latents",
    2,
    EncodeConfig,
    encode,
    roles=("images", "autoencoder"),
    optional=TOKEN_SPACES,
    examples=("./images ./latents --autoencoder stabilityai/sd-vae-ft-ema --num-gpus-per-worker 1 --precision bf16",),
)

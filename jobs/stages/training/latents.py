"""The latents of a training, opened by its reader."""

import math
import socket
from typing import TYPE_CHECKING, Any

from edt_core.config import TrainConfig
from edt_core.data.subsets import joint_share
from edt_core.errors import UserError
from edt_core.evaluation.extractors import TOKEN_SPACES, extractor_spec
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, FileEntry
from edt_core.store.cache import Cache
from edt_core.store.digests import damaged
from edt_core.store.layout import LATENT_SHARD, LATENT_TAR_SHARD, LATENT_TOKENS

if TYPE_CHECKING:
    from edt_core.data.batches import Latents
    from edt_core.data.streaming import ShardStream

LATENT_SHARDS = LATENT_SHARD.replace("{:05d}", "*")
_TARS = LATENT_TAR_SHARD.replace("{:05d}", "*")
_TOKENS = LATENT_TOKENS.replace("{:05d}", "*")


def open_latents(config: TrainConfig, latents: Artifact, progress: Progress, rows: slice | None = None) -> "Latents":
    """The latents for `config.reader`: memory-mapped, or as a stream.

    `rows`: those of a global batch that this machine reads; None for all.

    Mapped files are first compared with the digests of the manifest, once on each node; streamed shards when they are
    fetched, and streamed tars while they are read. Raises UserError for a shard that is missing, extra or resized, for
    a mapped one that is swapped, duplicated or changed, and if there are no shards for the reader.
    """
    from edt_core.data.latents import LatentDataset
    from edt_core.data.scale import LatentScale
    from edt_core.data.streaming import TarShard, TarStream

    if config.reader == "arrow":
        latents.verify_once(LATENT_SHARDS, progress)
        return LatentDataset(latents.paths(LATENT_SHARDS))
    if problems := latents.problems():
        raise damaged(latents.folder, problems)
    if config.reader == "stream":
        stream = shard_stream(config, latents)
        _check_disk(config, stream, rows or slice(0, config.global_batch_size))
        return stream
    shards = tuple(TarShard(latents.data, e.path, e.rows or 0, e.sha256) for e in _tars(latents))
    shape, scale = tuple(latents.counts["latent_shape"]), LatentScale.of(latents.counts)
    return TarStream(shards, shape, scale, config.shuffle_buffer, latents.counts.get("store", "fp32"))


def rows_of_node(batch: int) -> slice:
    """The rows of a global batch that the workers of this worker's node train on: Ray Train numbers them in a row."""
    import ray.train

    worker = ray.train.get_context()
    total, first = worker.get_world_size(), worker.get_world_rank() - worker.get_local_rank()
    ranks = range(first, first + worker.get_local_world_size())
    assert 0 <= ranks.start < ranks.stop <= total, (ranks, total)
    return joint_share(batch, ranks, total)


def shard_stream(config: TrainConfig, latents: Artifact) -> "ShardStream":
    """The Arrow shards as the stream of this training. Raises UserError if they have no rows."""
    from edt_core.data.scale import LatentScale
    from edt_core.data.streaming import ShardStream

    entries = tuple(latents.entries(LATENT_SHARDS))
    if not sum(entry.rows or 0 for entry in entries):
        raise UserError(f"the {len(entries)} latent shards of {latents.folder.uri} contain no rows; encode again")
    return ShardStream(
        latents,
        entries,
        tuple(latents.counts["latent_shape"]),
        LatentScale.of(latents.counts),
        config.canonical_nodes,
        config.shuffle_block,
        latents.counts.get("store", "fp32"),
        tuple(latents.entries(_TOKENS)) if config.align == "features" else (),
    )


def stream_text(config: TrainConfig, latents: Artifact) -> str:
    """What streaming needs of the network and the disk, for the estimate of a training."""
    stream, batch = shard_stream(config, latents), config.global_batch_size
    nodes = f"{config.canonical_nodes} canonical nodes (a multiple of the number of machines is best)"
    text = f"  {'streamed shards':<25} {len(stream.entries):,} for {nodes}"
    if latents.data.local is not None:
        return text
    need, bound = stream.disk_bytes(slice(0, batch), batch), Cache.of_node().bound
    text += f"; one machine with all of them keeps {need / 1e9:.3g} GB on its disk, and starts with half of it. "
    text += f"The cache of a machine like this one keeps at most {bound / 1e9:.3g} GB"
    if need <= bound:
        return text
    most = next((n for n in range(config.canonical_nodes, 0, -1) if stream.bytes_of(n) <= bound), 0)
    fitting = f"{most} of the {config.canonical_nodes} canonical nodes" if most else "no canonical node"
    return f"{text}, enough for {fitting}: raise EDT_CACHE_BYTES, lower train.shuffle_block, or use more machines"


def _check_disk(config: TrainConfig, stream: "ShardStream", rows: slice) -> None:
    """Raise UserError if this machine's cache is too small for the blocks that it reads at a time."""
    if stream.artifact.data.local is not None:
        return
    from edt_core.data.streaming.shards import canonical_shares

    batch, cache = config.global_batch_size, Cache.of_node()
    need = stream.disk_bytes(rows, batch)
    if need > cache.bound:
        nodes = len(canonical_shares(rows, batch, config.canonical_nodes))
        raise UserError(
            f"train.reader is stream: this machine reads {nodes} of the {config.canonical_nodes} canonical nodes, and "
            f"two blocks of {config.shuffle_block} shards of each, {need:,} bytes, must be on its disk at a time, but "
            f"the cache {cache.root} on {socket.gethostname()} keeps at most {cache.bound:,}; raise EDT_CACHE_BYTES, "
            "lower train.shuffle_block, or preprocess with a smaller images_per_shard"
        )


def open_tokens(config: TrainConfig, latents: Artifact, progress: Progress) -> Any:
    """The tokens beside the latents, memory-mapped after their digests were compared; None if they are not needed."""
    from edt_core.data.latents.tokens import TokenTable

    if config.align != "features" or config.reader == "stream":  # a stream brings its own
        return None
    latents.verify_once(_TOKENS, progress)
    return TokenTable(latents.paths(_TOKENS))


def check_latents(config: TrainConfig, latents: Artifact) -> None:
    """Raise UserError unless the latents have what the training reads: tars for its workers, and tokens."""
    from edt_core.data.streaming.tars import check_shards

    if config.reader == "webdataset":
        check_shards(len(_tars(latents)), config.worker_range[1])
    if config.align == "features":
        _check_tokens(config, latents)


def _check_tokens(config: TrainConfig, latents: Artifact) -> None:
    side, width = config.align_features
    if (shape := latents.counts.get("tokens")) is None:
        options = " or ".join(extractor_spec(space).option for space in TOKEN_SPACES)
        raise UserError(
            f"train.align is features, but {latents.folder.uri} has no tokens of a feature network; encode again with "
            f"{options}, or set another train.align"
        )
    if shape != [side**2, width]:
        raise UserError(
            f"train.align_features is [{side}, {width}], so an image has {side**2} tokens of width {width}, but "
            f"{latents.folder.uri} has {shape[0]} of width {shape[1]}; set train.align_features to "
            f"[{math.isqrt(shape[0])}, {shape[1]}]"
        )


def _tars(latents: Artifact) -> list[FileEntry]:
    """The WebDataset shards of a latents artifact. Raises UserError if it has none."""
    entries = latents.entries(_TARS)
    if not entries:
        raise UserError(
            f"train.reader is webdataset, but {latents.folder.uri} has no {_TARS}: encode again with "
            "encode.write_webdataset=true, or train with train.reader=stream"
        )
    return entries

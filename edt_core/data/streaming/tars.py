"""The streaming reader: latents from WebDataset tars in sequence, for stores that do not fit on a node's disk.

It guarantees less than `latent_batches`:
- Each epoch contains each sample once, over all ranks, but a rank shuffles only the order of its shards and, within a
  buffer, their samples. Samples of one shard stay near each other.
- The order depends on the number of ranks and on the seed. Ranks whose shards have more samples are in an earlier
  epoch than the others at the same step.
- A shard is verified only when it has been read to its end: the step that detects damage fails, but earlier steps may
  have used samples of the damaged shard.
- A resumed stream restarts the epoch of its step at the epoch's first sample: samples of the interrupted epoch may
  occur twice, others not at all.
Mirror images are drawn by (seed, step) as with the other reader.

Format: WebDataset tar (github.com/webdataset/webdataset). Members are read as `.npy` and JSON, never unpickled; shards
are not opened by webdataset, because its opener runs the command of a `pipe:` name in a shell.
"""

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edt_core.data.latents import NUMBER_FORMATS, NumberFormat
from edt_core.data.loader import BatchPlan, Buffers, LatentBatch
from edt_core.data.prefetch import prefetched
from edt_core.data.scale import LatentScale
from edt_core.errors import UserError
from edt_core.store.folder import Folder
from edt_core.store.layout import JSON_MEMBER, KEY, LABEL, LATENT_TAR_MEMBER

_READ_BYTES = 1 << 20
_REMEDY = "remove the latents artifact and encode again with encode.write_webdataset=true"


@dataclass(frozen=True)
class TarShard:
    """One tar of an artifact, with its rows and its hex sha256 according to the manifest."""

    folder: Folder
    name: str
    rows: int
    sha256: str

    @property
    def uri(self) -> str:
        return f"{self.folder.uri}/{self.name}"

    def stream(self) -> "_Digested":
        """Open the tar as a stream and read its first bytes."""
        try:
            if (root := self.folder.local) is not None:
                raw: Any = (root / self.name).open("rb", buffering=0)
            else:
                files, path = self.folder.filesystem()
                raw = files.open(f"{path}/{self.name}", "rb")
        except FileNotFoundError as error:
            raise UserError(f"{self.uri} is missing; {_REMEDY}") from error
        stream = io.BufferedReader(raw, _READ_BYTES)
        stream.peek(1)
        return _Digested(stream)


class _Digested:
    """A stream that is digested while it is read, to detect flipped bits."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream, self._digest = stream, hashlib.sha256()

    def __repr__(self) -> str:
        return "the stream"  # for tarfile's messages, in place of a memory address

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        return data

    def finish(self) -> str:
        """Read the rest; return the hex sha256 of all bytes."""
        while self.read(_READ_BYTES):
            pass
        return self._digest.hexdigest()

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> "_Digested":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class TarStream:
    """The tars of one artifact to stream, and the metadata that their members lack."""

    shards: tuple[TarShard, ...]
    latent_shape: tuple[int, int, int]  # C, h, h
    scale: LatentScale
    shuffle_buffer: int = 10_000  # samples, of 16*C*h*h bytes each: 640 MiB per rank at 4 x 32 x 32, half in fp16
    store: str = "fp32"  # the numbers of the posteriors: a name of NUMBER_FORMATS

    @property
    def numbers(self) -> NumberFormat:
        """The format of the posteriors' numbers."""
        return NUMBER_FORMATS[self.store]

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)


@dataclass(frozen=True)
class _Sample:
    key: str
    label: int
    posterior: NDArray[Any]  # [2, 2, C, h, h] as stored


def stream_tars(stream: TarStream, plan: BatchPlan, start_step: int = 0) -> Generator[LatentBatch, None, None]:
    """Endless batches of steps start_step, start_step + 1, ...; the module describes their order.

    Raises UserError immediately if there are fewer shards than ranks, and during iteration for a shard with another
    number of rows or another digest than its manifest says, or with an unknown member.
    """
    shards = [shard for shard in stream.shards if shard.rows]
    check_shards(len(shards), plan.world_size)
    return _batches(stream, shards, plan, start_step)


def check_shards(shards: int, world_size: int) -> None:
    """Raise UserError if a rank would have no shard."""
    if shards < world_size:
        raise UserError(
            f"{shards} latent tar shards for {world_size} workers: each worker needs at least one shard; use fewer "
            "workers, or preprocess with a smaller images_per_shard and encode again"
        )


def _batches(
    stream: TarStream, shards: Sequence[TarShard], plan: BatchPlan, start_step: int
) -> Generator[LatentBatch, None, None]:
    with closing(_samples(stream, shards, plan, start_step)) as samples:
        buffers = Buffers(plan, stream.latent_shape, stream.numbers)
        for step in count(start_step):
            mirror = plan.mirror(step)
            batch = list(islice(samples, len(mirror)))
            posterior, array = buffers.empty()
            sides = [sample.posterior[side] for sample, side in zip(batch, mirror.astype(int), strict=True)]
            np.stack(sides, out=array)
            del array  # only the batch may refer to a buffer in use
            labels = torch.tensor([sample.label for sample in batch])
            keys = tuple(sample.key for sample in batch)
            yield LatentBatch(step, np.full(len(batch), -1), mirror, posterior, labels, keys)


def _samples(
    stream: TarStream, shards: Sequence[TarShard], plan: BatchPlan, start_step: int
) -> Generator[_Sample, None, None]:
    """This rank's samples, epoch after epoch."""
    from webdataset import shuffle

    first_epoch = start_step * plan.global_batch_size // sum(shard.rows for shard in shards)
    for epoch in count(first_epoch):
        # The step is part of the seed: otherwise a run that is interrupted often would see only the same shards.
        seed = [plan.seed, epoch, start_step]
        order = np.random.default_rng(seed).permutation(len(shards))
        rank_shards = [shards[index] for index in order[plan.rank :: plan.world_size]]
        rng = random.Random(int(np.random.default_rng([*seed, plan.rank]).integers(1 << 62)))
        shuffler = shuffle(stream.shuffle_buffer, initial=max(1, stream.shuffle_buffer // 10), rng=rng)
        with closing(_read(stream, rank_shards)) as samples:
            yield from shuffler(samples)


def _read(stream: TarStream, shards: Sequence[TarShard]) -> Generator[_Sample, None, None]:
    """The samples of the shards in order; the next shard is opened while one is read."""
    with ExitStack() as files:
        streams = ((shard, files.enter_context(shard.stream())) for shard in shards)
        with closing(prefetched(streams, 1)) as ahead:
            for shard, file in ahead:
                yield from _read_shard(stream, shard, file)
                file.close()


def _read_shard(stream: TarStream, shard: TarShard, file: _Digested) -> Iterator[_Sample]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    rows = 0
    try:
        members = tar_file_expander([{"url": shard.uri, "stream": file}])
        for sample in group_by_keys(_checked(shard, members)):
            yield _decode(stream, shard, sample)
            rows += 1
    except UserError:
        raise
    except (tarfile.TarError, ValueError) as error:  # truncated within a member, or a repeated member
        raise UserError(f"{shard.uri} is not a complete latent tar ({error.args[0]}); {_REMEDY}") from error
    if rows != shard.rows:  # webdataset reads a tar that was cut between two members as a shorter one
        raise UserError(f"{shard.uri} contains {rows} samples, its manifest says {shard.rows}; {_REMEDY}")
    if file.finish() != shard.sha256:
        raise UserError(f"{shard.uri} differs from its manifest (another sha256); {_REMEDY}")


def _checked(shard: TarShard, members: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The members, unchanged. Raises UserError for one that does not belong in a latent shard."""
    for member in members:
        name = member.get("fname", "")
        if member and name.partition(".")[2] not in (LATENT_TAR_MEMBER, JSON_MEMBER):
            raise UserError(
                f"{shard.uri} has a member {name!r}; a latent shard has only {LATENT_TAR_MEMBER} and {JSON_MEMBER}; "
                f"{_REMEDY}"
            )
        yield member


def _decode(stream: TarStream, shard: TarShard, members: dict[str, Any]) -> _Sample:
    try:
        record = json.loads(members[JSON_MEMBER])
        posterior = np.lib.format.read_array(io.BytesIO(members[LATENT_TAR_MEMBER]), allow_pickle=False)
        sample = _Sample(str(record[KEY]), int(record[LABEL]), posterior)
    except (KeyError, TypeError, ValueError, RecursionError, MemoryError) as error:  # a header may state any shape
        raise UserError(f"sample {members['__key__']} of {shard.uri} cannot be read ({error}); {_REMEDY}") from error
    shape, dtype = (2, 2, *stream.latent_shape), stream.numbers.array
    if posterior.shape != shape or posterior.dtype != dtype:
        raise UserError(
            f"sample {sample.key} of {shard.uri} is {posterior.dtype} {posterior.shape}, not {dtype} {shape}; {_REMEDY}"
        )
    return sample

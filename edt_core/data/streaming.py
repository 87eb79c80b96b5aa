"""The second reader: latents streamed from WebDataset tars, front to back, for stores that do not fit a node's disk.

It promises less than `latent_batches` does:
- Each epoch takes each sample once, over all ranks, but a rank shuffles only the order of its shards and, within a
  buffer, their samples. Samples of one shard stay near each other.
- The order depends on the number of ranks and on the seed. Ranks whose shards hold more samples are in an earlier
  epoch than the others at the same step.
- A shard is known to be whole only once it was read to its end: the step that finds damage fails, but steps before it
  may have used samples of the damaged shard.
- A resumed stream draws the epoch of its step again, and starts that epoch at its first sample: samples of the
  interrupted epoch may come a second time, and others not at all.
Mirror images are drawn by (seed, step) as with the other reader.

Format: WebDataset tar (github.com/webdataset/webdataset). Members are read as `.npy` and JSON, never unpickled; shards
are opened here and not by webdataset, whose opener runs the command of a `pipe:` name in a shell.
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
    """One tar of an artifact, and the rows and the hex sha256 that the manifest says it has."""

    folder: Folder
    name: str
    rows: int
    sha256: str

    @property
    def uri(self) -> str:
        return f"{self.folder.uri}/{self.name}"

    def stream(self) -> "_Digested":
        """The tar as a stream whose first bytes are here."""
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
    """A stream that is digested as it is read: nothing else would see a flipped bit."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream, self._digest = stream, hashlib.sha256()

    def __repr__(self) -> str:
        return "the stream"  # tarfile's messages name it; an address would tell nobody anything

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        return data

    def finish(self) -> str:
        """Read what is left; hex sha256 of the whole."""
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
class LatentStream:
    """What is streamed: tars of one artifact, and what their members do not say."""

    shards: tuple[TarShard, ...]
    latent_shape: tuple[int, int, int]  # C, h, h
    scale: LatentScale
    shuffle_buffer: int = 10_000  # samples, of 16*C*h*h bytes each: 640 MiB a rank at 4 x 32 x 32

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)


@dataclass(frozen=True)
class _Sample:
    key: str
    label: int
    posterior: NDArray[np.float32]  # [2, 2, C, h, h]


def stream_latents(stream: LatentStream, plan: BatchPlan, start_step: int = 0) -> Generator[LatentBatch, None, None]:
    """Batches of steps start_step, start_step + 1, ... without end; see the module for what is promised of their order.

    Raises UserError at once where there are fewer shards than ranks, and while iterating for a shard that does not
    hold the rows or does not have the digest stated, or for a member that is not ours.
    """
    shards = [shard for shard in stream.shards if shard.rows]
    check_shards(len(shards), plan.world_size)
    return _batches(stream, shards, plan, start_step)


def check_shards(shards: int, world_size: int) -> None:
    """Raise UserError where a rank would have no shard."""
    if shards < world_size:
        raise UserError(
            f"{shards} latent tar shards for {world_size} workers: a worker without a shard would make the "
            "others wait for ever; use fewer workers, or preprocess with a smaller images_per_shard and encode again"
        )


def _batches(
    stream: LatentStream, shards: Sequence[TarShard], plan: BatchPlan, start_step: int
) -> Generator[LatentBatch, None, None]:
    with closing(_samples(stream, shards, plan, start_step)) as samples:
        buffers = Buffers(plan, stream.latent_shape)
        for step in count(start_step):
            mirror = plan.mirror(step)
            taken = list(islice(samples, len(mirror)))
            posterior = buffers.empty()
            sides = [sample.posterior[side] for sample, side in zip(taken, mirror.astype(int), strict=True)]
            np.stack(sides, out=posterior.numpy())
            labels = torch.tensor([sample.label for sample in taken])
            keys = tuple(sample.key for sample in taken)
            yield LatentBatch(step, np.full(len(taken), -1), mirror, posterior, labels, keys)


def _samples(
    stream: LatentStream, shards: Sequence[TarShard], plan: BatchPlan, start_step: int
) -> Generator[_Sample, None, None]:
    """This rank's samples, epoch after epoch."""
    from webdataset import shuffle

    first_epoch = start_step * plan.global_batch_size // sum(shard.rows for shard in shards)
    for epoch in count(first_epoch):
        # The step is part of the seed: a run that is interrupted again and again would see the same shards only.
        drawn = [plan.seed, epoch, start_step]
        order = np.random.default_rng(drawn).permutation(len(shards))
        mine = [shards[place] for place in order[plan.rank :: plan.world_size]]
        rng = random.Random(int(np.random.default_rng([*drawn, plan.rank]).integers(1 << 62)))
        shuffled = shuffle(stream.shuffle_buffer, initial=max(1, stream.shuffle_buffer // 10), rng=rng)
        with closing(_read(mine, stream.latent_shape)) as samples:
            yield from shuffled(samples)


def _read(shards: Sequence[TarShard], latent_shape: tuple[int, int, int]) -> Generator[_Sample, None, None]:
    """The samples of the shards in order; the next shard is opened while one is read."""
    with ExitStack() as files:
        opened = ((shard, files.enter_context(shard.stream())) for shard in shards)
        with closing(prefetched(opened, 1)) as ahead:
            for shard, file in ahead:
                yield from _read_shard(shard, file, latent_shape)
                file.close()


def _read_shard(shard: TarShard, file: _Digested, latent_shape: tuple[int, int, int]) -> Iterator[_Sample]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    rows = 0
    try:
        members = tar_file_expander([{"url": shard.uri, "stream": file}])
        for one in group_by_keys(_known(shard, members)):
            yield _decode(shard, one, latent_shape)
            rows += 1
    except UserError:
        raise
    except (tarfile.TarError, ValueError) as error:  # cut within a member, or a member that is there twice
        raise UserError(f"{shard.uri} is not a whole latent tar ({error.args[0]}); {_REMEDY}") from error
    if rows != shard.rows:  # webdataset takes a tar that was cut between two members for a shorter one
        raise UserError(f"{shard.uri} holds {rows} samples, its manifest says {shard.rows}; {_REMEDY}")
    if file.finish() != shard.sha256:
        raise UserError(f"{shard.uri} is not what its manifest says (another sha256); {_REMEDY}")


def _known(shard: TarShard, members: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The members as they come. Raises UserError for one that a latent shard does not have."""
    for member in members:
        name = member.get("fname", "")
        if member and name.partition(".")[2] not in (LATENT_TAR_MEMBER, JSON_MEMBER):
            raise UserError(
                f"{shard.uri} has a member {name!r}; a latent shard has {LATENT_TAR_MEMBER} and {JSON_MEMBER} alone, "
                f"and nothing else is decoded; {_REMEDY}"
            )
        yield member


def _decode(shard: TarShard, members: dict[str, Any], latent_shape: tuple[int, int, int]) -> _Sample:
    try:
        about = json.loads(members[JSON_MEMBER])
        posterior = np.lib.format.read_array(io.BytesIO(members[LATENT_TAR_MEMBER]), allow_pickle=False)
        sample = _Sample(str(about[KEY]), int(about[LABEL]), posterior)
    except (KeyError, TypeError, ValueError, RecursionError, MemoryError) as error:  # a header may state any shape
        raise UserError(f"sample {members['__key__']} of {shard.uri} cannot be read ({error}); {_REMEDY}") from error
    if posterior.shape != (2, 2, *latent_shape) or posterior.dtype != np.float32:
        raise UserError(
            f"sample {sample.key} of {shard.uri} is {posterior.dtype} {posterior.shape}, not float32 "
            f"{(2, 2, *latent_shape)}; {_REMEDY}"
        )
    return sample

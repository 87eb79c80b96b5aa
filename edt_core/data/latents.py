"""Latent shards: the posteriors of an image and of its mirror image, one Arrow row per image.

Format: Arrow IPC *file* format, never the stream format (a stream cut at a message boundary ends early silently).
Columns: `key` string, `label` int64, and `posterior`, `mirror_posterior`, fixed-size lists float32[2*C*h*h]: mean, then
std, of the autoencoder before scaling. Record batches have LATENT_ROWS_PER_BATCH rows, the last one the rest. The
schema's metadata records autoencoder, scale (see `edt_core.data.scale`), image size, latent shape and source shard.

Legend: N rows of a shard, n requested rows, C latent channels, h latent height and width, W = 2*C*h*h.
A row's posterior is float32 [2, 2, C, h, h]: side (image, mirror image), then (mean, std).
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain, pairwise
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from edt_core.data.scale import SCALE_FIELDS, LatentScale
from edt_core.data.shards import npy_bytes, write_tar
from edt_core.errors import UserError
from edt_core.store.layout import (
    CENTRED_LATENT_SCHEMA_VERSION,
    JSON_MEMBER,
    KEY,
    LABEL,
    LATENT_ROWS_PER_BATCH,
    LATENT_SCHEMA_VERSION,
    LATENT_TAR_MEMBER,
    POSTERIOR_COLUMNS,
)

LatentRow: TypeAlias = tuple[str, int, NDArray[np.float32]]  # key, label, posterior [2, 2, C, h, h]


@dataclass(frozen=True)
class LatentInfo:
    """The metadata of a latent shard."""

    autoencoder: str
    scale: LatentScale
    image_size: int
    latent_shape: tuple[int, int, int]  # C, h, h
    source_shard: str = ""

    @property
    def schema_version(self) -> str:
        return LATENT_SCHEMA_VERSION if self.scale.is_plain else CENTRED_LATENT_SCHEMA_VERSION

    def to_metadata(self) -> dict[bytes, bytes]:
        values = {
            "autoencoder": self.autoencoder,
            "scaling_factor": self.scale.scaling_factor,
            "image_size": self.image_size,
            "latent_shape": self.latent_shape,
            "source_shard": self.source_shard,
            "schema_version": self.schema_version,
            **self.scale.beyond_factor(),
        }
        return {name.encode(): json.dumps(value).encode() for name, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: dict[bytes, bytes] | None, where: str) -> "LatentInfo":
        """Parse the metadata. Raises UserError if it is not a latent shard's, or has another schema version."""
        try:
            values = {name.decode(): json.loads(value) for name, value in (metadata or {}).items()}
            version = values.pop("schema_version")
            scale = LatentScale.of({name: values.pop(name, None) for name in SCALE_FIELDS})
            values["latent_shape"] = tuple(values["latent_shape"])
            info = cls(scale=scale, **values)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{where} is not a latent shard: its Arrow schema lacks {error}; encode the images"
            ) from error
        if version != info.schema_version:
            raise UserError(
                f"{where} has latent schema {version}, and expected is {info.schema_version} "
                f"({LATENT_SCHEMA_VERSION}, or {CENTRED_LATENT_SCHEMA_VERSION} for centred latents); encode the images "
                "again"
            )
        return info

    @property
    def encoding(self) -> tuple[str, dict[str, Any], int, tuple[int, int, int]]:
        """The values that all shards of one artifact share."""
        return self.autoencoder, self.scale.record(), self.image_size, self.latent_shape


def latent_schema(info: LatentInfo) -> pa.Schema:
    """The Arrow schema of a shard."""
    side = pa.list_(pa.float32(), 2 * prod(info.latent_shape))
    fields = [(KEY, pa.string()), (LABEL, pa.int64()), *((name, side) for name in POSTERIOR_COLUMNS)]
    return pa.schema(fields, metadata=info.to_metadata())


class LatentShardWriter:
    """Writes one Arrow shard; a context manager.

    Rows are buffered and written as record batches of LATENT_ROWS_PER_BATCH: memory is bounded for any size of shard,
    and the bytes of the file do not depend on how the rows were split into calls. If the block ends with an exception,
    no file remains.
    """

    def __init__(self, path: Path, info: LatentInfo) -> None:
        self.path, self.info = path, info
        self.rows = 0  # written so far
        self._schema = latent_schema(info)
        self._keys: list[str] = []
        self._labels = np.empty(LATENT_ROWS_PER_BATCH, np.int64)
        self._sides = np.empty((len(POSTERIOR_COLUMNS), LATENT_ROWS_PER_BATCH, 2 * prod(info.latent_shape)), np.float32)

    def __enter__(self) -> "LatentShardWriter":
        self._sink = pa.OSFile(str(self.path), "wb")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        return self

    def write(self, keys: Sequence[str], labels: Sequence[int] | NDArray[np.int64], posterior: NDArray) -> None:
        """Append n rows: keys, labels, and posterior float32 [n, 2, 2, C, h, h]."""
        assert posterior.dtype == np.float32, posterior.dtype
        assert posterior.shape == (len(keys), 2, 2, *self.info.latent_shape), (len(keys), posterior.shape)
        assert len(labels) == len(keys), (len(labels), len(keys))
        number, _, width = self._sides.shape
        sides = posterior.reshape(len(keys), number, width).swapaxes(0, 1)
        done = 0
        while done < len(keys):
            start = len(self._keys)
            source = slice(done, done + LATENT_ROWS_PER_BATCH - start)
            self._keys += keys[source]
            target = slice(start, len(self._keys))
            self._labels[target] = labels[source]
            self._sides[:, target] = sides[:, source]
            done += len(self._keys) - start
            if len(self._keys) == LATENT_ROWS_PER_BATCH:
                self._flush()
        self.rows += len(keys)

    def _flush(self) -> None:
        rows = len(self._keys)
        if not rows:
            return
        types = self._schema.types[-len(self._sides) :]
        sides = [
            pa.FixedSizeListArray.from_arrays(pa.array(side[:rows].reshape(-1)), type=list_type)
            for side, list_type in zip(self._sides, types, strict=True)
        ]
        columns = [pa.array(self._keys, pa.string()), pa.array(self._labels[:rows]), *sides]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._keys.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        complete = False
        try:
            if kind is None:
                self._flush()
                self._writer.close()  # writes the footer, without which the file cannot be read
                complete = True
        finally:
            self._sink.close()
            if not complete:
                self.path.unlink(missing_ok=True)


class LatentShard:
    """A memory-mapped Arrow shard; iterating yields its rows.

    `keys` and `labels` int64 [N] are those of all rows. `chunks[i]` are the sides (image, mirror image) of record batch
    i, float32 [rows, W] each, as views of the file. Raises UserError for a file that is not a complete shard of this
    schema.
    """

    def __init__(self, path: Path) -> None:
        try:
            with pa.memory_map(str(path)) as source:
                reader = pa.ipc.open_file(source)
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a complete Arrow file ({error}); encode the images again") from error
        self.info = LatentInfo.from_metadata(reader.schema.metadata, str(path))
        _check_layout(path, reader.schema, batches, latent_schema(self.info))
        self.keys = pa.chunked_array([batch.column(KEY) for batch in batches], pa.string())
        labels = [np.empty(0, np.int64), *(batch.column(LABEL).to_numpy() for batch in batches)]
        self.labels: NDArray[np.int64] = np.concatenate(labels)
        self.chunks = [
            (_matrix(batch.column(POSTERIOR_COLUMNS[0])), _matrix(batch.column(POSTERIOR_COLUMNS[1])))
            for batch in batches
        ]

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[LatentRow]:
        """Key, label and a copy of the posterior, row by row."""
        sides = chain.from_iterable(zip(*chunk, strict=True) for chunk in self.chunks)
        for key, label, row in zip(self.keys, self.labels.tolist(), sides, strict=True):
            yield key.as_py(), label, np.stack(row).reshape(2, 2, *self.info.latent_shape)

    def posterior(self) -> NDArray[np.float32]:
        """The whole shard, copied: float32 [N, 2, 2, C, h, h]."""
        out = np.empty((len(self), 2, 2, *self.info.latent_shape), np.float32)
        start = 0
        for chunk in self.chunks:
            out[start : start + len(chunk[0])] = np.stack(chunk, axis=1).reshape(-1, *out.shape[1:])
            start += len(chunk[0])
        return out


def _check_layout(path: Path, schema: pa.Schema, batches: list[pa.RecordBatch], expected: pa.Schema) -> None:
    """Raise UserError unless columns, types and the rows of the record batches are as the writer lays them out."""
    if not schema.equals(expected):
        columns, right = (", ".join(f"{field.name} {field.type}" for field in each) for each in (schema, expected))
        raise UserError(f"{path} has the columns {columns}, a latent shard has {right}; encode the images again")
    sizes = [batch.num_rows for batch in batches]
    if any(size != LATENT_ROWS_PER_BATCH for size in sizes[:-1]) or not all(
        0 < size <= LATENT_ROWS_PER_BATCH for size in sizes[-1:]
    ):
        raise UserError(
            f"{path} has record batches of {sorted(set(sizes))} rows, a latent shard has {LATENT_ROWS_PER_BATCH} in "
            "each and the rest in the last; encode the images again"
        )
    if any(column.null_count for batch in batches for column in batch.columns):
        raise UserError(f"{path} has empty cells, a latent shard has none; encode the images again")


def _matrix(column: pa.FixedSizeListArray) -> NDArray[np.float32]:
    flat: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(column), column.type.list_size)


def write_latent_tar(path: Path, rows: Iterable[LatentRow]) -> int:
    """Write rows, such as those of an Arrow shard, as a WebDataset tar; return their number.

    A sample has the members `posterior.npy`, float32 [2, 2, C, h, h] without pickle, and `json`: {"key", "label"}.
    """

    def members(key: str, label: int, posterior: NDArray[np.float32]) -> dict[str, bytes]:
        record = json.dumps({KEY: key, LABEL: int(label)}, sort_keys=True)
        return {LATENT_TAR_MEMBER: npy_bytes(posterior), JSON_MEMBER: record.encode()}

    return write_tar(path, ((key, members(key, label, posterior)) for key, label, posterior in rows))


class LatentDataset:
    """All latent shards of an artifact as one indexable table, in order of shard and row.

    Raises UserError for shards of different encodings, for a repeated shard, and for shards out of order: the order of
    training data is defined by row number and would change silently.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if not paths:
            raise UserError("no latent shards given; encode the images first")
        shards = [LatentShard(path) for path in paths]
        self.info = shards[0].info
        for path, shard in zip(paths, shards, strict=True):
            if shard.info.encoding != self.info.encoding:
                raise UserError(
                    f"{path} was encoded as {shard.info.encoding}, {paths[0]} as {self.info.encoding}; encode the "
                    "images again"
                )
        _check_order(paths, [shard.info.source_shard for shard in shards])
        self.labels: NDArray[np.int64] = np.concatenate([shard.labels for shard in shards])
        chunks = [chunk for shard in shards for chunk in shard.chunks]
        self._sides = [[chunk[side] for chunk in chunks] for side in range(len(POSTERIOR_COLUMNS))]
        self._starts = np.cumsum([0, *(len(chunk[0]) for chunk in chunks)])  # first row of each chunk, then all rows
        self._rows: NDArray[np.int64] | None = None  # the rows of a part
        if not len(self):
            raise UserError(f"the {len(paths)} latent shards contain no rows; encode the images again")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def scale(self) -> LatentScale:
        return self.info.scale

    def part(self, rows: NDArray[np.int64]) -> "LatentDataset":
        """These rows, int64 [n], as a data set whose row i is row `rows[i]` of this one. Copies no latents."""
        part = copy(self)
        part.labels, part._rows = self.labels[rows], self.origin(rows)
        return part

    def origin(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows, in the shards, of some rows of this data set; they differ only for a part."""
        return indices if self._rows is None else self._rows[indices]

    def gather(
        self, indices: NDArray[np.int64], mirror: NDArray[np.bool_], out: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Posterior float32 [n, 2, C, h, h] (mean, std) and labels int64 [n] of rows; mirrored where `mirror` is true.

        If `out` (C-contiguous, of that shape) is given, the posterior is written to it. Raises IndexError for rows out
        of range.
        """
        shape = (len(indices), 2, *self.info.latent_shape)
        posterior = np.empty(shape, np.float32) if out is None else out
        assert posterior.shape == shape, (posterior.shape, shape)
        assert posterior.dtype == np.float32, posterior.dtype
        assert posterior.flags.c_contiguous
        if not len(indices):
            return posterior, np.empty(0, np.int64)
        if indices.min() < 0 or indices.max() >= len(self):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of {len(self)}")
        places_in_shards = self.origin(indices)
        chunks = np.searchsorted(self._starts, places_in_shards, side="right") - 1
        rows = places_in_shards - self._starts[chunks]
        # One call copies a list of row views, without a pass per shard: at most a sixth slower than from memory.
        places = zip(mirror.astype(int).tolist(), chunks.tolist(), rows.tolist(), strict=True)
        np.concatenate([self._sides[side][chunk][row] for side, chunk, row in places], out=posterior.reshape(-1))
        return posterior, self.labels[indices]


def _check_order(paths: Sequence[Path], sources: list[str]) -> None:
    for index, (previous, source) in enumerate(pairwise(sources), start=1):
        if source in sources[:index]:
            twin = paths[sources.index(source)]
            raise UserError(
                f"{twin} and {paths[index]} both come from {source!r}: a repeated shard; encode the images again"
            )
        if source < previous:
            raise UserError(
                f"{paths[index]} comes from {source!r}, but {paths[index - 1]} before it from {previous!r}: the shards "
                "are out of order; give them in the order of their image shards, or encode the images again"
            )

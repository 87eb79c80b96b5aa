"""Writes and reads one latent shard.

Legend: N rows of a shard, n rows of a call, C latent channels, h latent height and width, W = 2*C*h*h.
A row's posterior is [2, 2, C, h, h]: side (image, mirror image), then (mean, std). Its rounding is float32 [2, C]: the
largest error of the stored means, then of the stored stds, of both sides; 0 in float32.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from edt_core.data.latents.layout import LatentInfo, check_layout, latent_schema
from edt_core.data.shards import npy_bytes, write_tar
from edt_core.errors import UserError
from edt_core.store.layout import (
    JSON_MEMBER,
    KEY,
    LABEL,
    LATENT_ROWS_PER_BATCH,
    LATENT_TAR_MEMBER,
    POSTERIOR_COLUMNS,
    ROUNDING,
)

LatentRow: TypeAlias = tuple[str, int, NDArray[Any]]  # key, label, posterior [2, 2, C, h, h] as stored


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
        self._sides = np.empty(
            (len(POSTERIOR_COLUMNS), LATENT_ROWS_PER_BATCH, 2 * prod(info.latent_shape)), info.numbers.array
        )
        self._rounding = np.empty((LATENT_ROWS_PER_BATCH, 2, info.latent_shape[0]), np.float32)

    def __enter__(self) -> "LatentShardWriter":
        self._sink = pa.OSFile(str(self.path), "wb")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        return self

    def write(
        self,
        keys: Sequence[str],
        labels: Sequence[int] | NDArray[np.int64],
        posterior: NDArray[np.float32],
        rounding: NDArray[np.float32] | None = None,
    ) -> None:
        """Append n rows: keys, labels, and posterior float32 [n, 2, 2, C, h, h], which is rounded to what is stored.

        rounding: float32 [n, 2, C] of rows that were rounded before. Raises UserError for a latent out of range.
        """
        assert posterior.dtype == np.float32, posterior.dtype
        assert posterior.shape == (len(keys), 2, 2, *self.info.latent_shape), (len(keys), posterior.shape)
        assert len(labels) == len(keys), (len(labels), len(keys))
        number, _, width = self._sides.shape
        stored, rounding = self._narrowed(posterior, rounding)
        sides = stored.reshape(len(keys), number, width).swapaxes(0, 1)
        done = 0
        while done < len(keys):
            start = len(self._keys)
            source = slice(done, done + LATENT_ROWS_PER_BATCH - start)
            self._keys += keys[source]
            target = slice(start, len(self._keys))
            self._labels[target] = labels[source]
            self._sides[:, target] = sides[:, source]
            self._rounding[target] = rounding[source]
            done += len(self._keys) - start
            if len(self._keys) == LATENT_ROWS_PER_BATCH:
                self._flush()
        self.rows += len(keys)

    def _narrowed(
        self, posterior: NDArray[np.float32], before: NDArray[np.float32] | None
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """The posterior as stored, and its rounding [n, 2, C]: of a row that was rounded before, what it lost then."""
        numbers, lost = self.info.numbers, np.zeros((len(posterior), 2, self.info.latent_shape[0]), np.float32)
        if not numbers.is_half:
            return posterior, lost
        stored = numbers.narrowed(posterior, f"the latents of {self.info.source_shard or self.path}")
        if len(posterior):
            lost = np.abs(numbers.widened(stored) - posterior).max(axis=(1, 4, 5))
        return stored, lost if before is None else np.maximum(lost, before)

    def _flush(self) -> None:
        rows = len(self._keys)
        if not rows:
            return
        lists = [*self._sides, self._rounding] if self.info.numbers.is_half else [*self._sides]
        arrays = [
            pa.FixedSizeListArray.from_arrays(pa.array(values[:rows].reshape(-1)), type=list_type)
            for values, list_type in zip(lists, self._schema.types[2:], strict=True)
        ]
        columns = [pa.array(self._keys, pa.string()), pa.array(self._labels[:rows]), *arrays]
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

    `keys`, `labels` int64 [N] and `rounding` float32 [N, 2, C] are those of all rows. `chunks[i]` are the sides (image,
    mirror image) of record batch i, [rows, W] each, as views of the file: float32, float16, or uint16 with the bits of
    bfloat16 (`info.numbers`). Raises UserError for a file that is not a complete shard of this schema.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with pa.memory_map(str(path)) as source:
                reader = pa.ipc.open_file(source)
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is not a complete Arrow file ({error}); encode the images again") from error
        self.info = LatentInfo.from_metadata(reader.schema.metadata, str(path))
        check_layout(path, reader.schema, batches, latent_schema(self.info))
        self.keys = pa.chunked_array([batch.column(KEY) for batch in batches], pa.string())
        labels = [np.empty(0, np.int64), *(batch.column(LABEL).to_numpy() for batch in batches)]
        self.labels: NDArray[np.int64] = np.concatenate(labels)
        self.chunks = [
            (_matrix(batch.column(POSTERIOR_COLUMNS[0])), _matrix(batch.column(POSTERIOR_COLUMNS[1])))
            for batch in batches
        ]
        self.rounding = np.zeros((len(self), 2, self.info.latent_shape[0]), np.float32)
        if self.info.numbers.is_half and batches:
            self.rounding = np.concatenate([_matrix(batch.column(ROUNDING)) for batch in batches]).reshape(
                self.rounding.shape
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[LatentRow]:
        """Key, label and a copy of the stored posterior, row by row."""
        sides = chain.from_iterable(zip(*chunk, strict=True) for chunk in self.chunks)
        for key, label, row in zip(self.keys, self.labels.tolist(), sides, strict=True):
            yield key.as_py(), label, np.stack(row).reshape(2, 2, *self.info.latent_shape)

    def posterior(self) -> NDArray[np.float32]:
        """The whole shard, copied: float32 [N, 2, 2, C, h, h]."""
        out = np.empty((len(self), 2, 2, *self.info.latent_shape), np.float32)
        start = 0
        for chunk in self.chunks:
            stored = np.stack(chunk, axis=1).reshape(-1, *out.shape[1:])
            out[start : start + len(stored)] = self.info.numbers.widened(stored)
            start += len(stored)
        return out


def _matrix(column: pa.FixedSizeListArray) -> NDArray[Any]:
    flat: NDArray[Any] = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(column), column.type.list_size)


def write_latent_tar(path: Path, rows: Iterable[LatentRow]) -> int:
    """Write rows, such as those of an Arrow shard, as a WebDataset tar; return their number.

    A sample has the members `posterior.npy`, [2, 2, C, h, h] as stored, without pickle, and `json`: {"key", "label"}.
    """

    def members(key: str, label: int, posterior: NDArray[Any]) -> dict[str, bytes]:
        record = json.dumps({KEY: key, LABEL: int(label)}, sort_keys=True)
        return {LATENT_TAR_MEMBER: npy_bytes(posterior), JSON_MEMBER: record.encode()}

    return write_tar(path, ((key, members(key, label, posterior)) for key, label, posterior in rows))

"""Latent shards: an image's and its mirror image's posterior, one Arrow row an image.

Format: Arrow IPC *file* format, never the stream format (a stream cut at a message boundary reads short in silence).
Columns: `key` string, `label` int64, and fixed-size lists float32[C*h*w] `mean`, `std`, `mirror_mean`, `mirror_std`,
the posterior of the autoencoder before scaling. The schema's metadata says which autoencoder, scaling factor, image
size, latent shape and source shard.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from edt_core.data.shards import npy_bytes, write_tar
from edt_core.errors import UserError
from edt_core.schema import (
    CLASS_MEMBER,
    JSON_MEMBER,
    KEY,
    LABEL,
    LATENT_SCHEMA_VERSION,
    LATENT_TAR_MEMBER,
    POSTERIOR_COLUMNS,
)


@dataclass(frozen=True)
class LatentInfo:
    """What a latent shard's metadata says."""

    autoencoder: str
    scaling_factor: float
    image_size: int
    latent_shape: tuple[int, int, int]  # C, h, h
    source_shard: str = ""
    schema_version: str = LATENT_SCHEMA_VERSION

    def to_metadata(self) -> dict[bytes, bytes]:
        return {name.encode(): json.dumps(value).encode() for name, value in asdict(self).items()}

    @classmethod
    def from_metadata(cls, metadata: dict[bytes, bytes] | None, where: str) -> "LatentInfo":
        try:
            values = {name.decode(): json.loads(value) for name, value in (metadata or {}).items()}
            values["latent_shape"] = tuple(values["latent_shape"])
            info = cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where} is no latent shard: its Arrow schema lacks {error}; encode the images") from error
        if info.schema_version != LATENT_SCHEMA_VERSION:
            raise UserError(
                f"{where} has latent schema {info.schema_version}, this code reads "
                f"{LATENT_SCHEMA_VERSION}; encode again"
            )
        return info


@dataclass(frozen=True)
class LatentRows:
    """Rows of a shard: `posterior` float32 [N, 4, C, h, h] in the order of POSTERIOR_COLUMNS."""

    keys: tuple[str, ...]
    labels: NDArray[np.int64]
    posterior: NDArray[np.float32]


def write_latent_shard(path: Path, rows: LatentRows, info: LatentInfo) -> int:
    """Write one Arrow shard; returns its number of rows."""
    width = int(np.prod(info.latent_shape))
    columns = {
        name: pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(rows.posterior[:, i]).reshape(-1), pa.float32()), width
        )
        for i, name in enumerate(POSTERIOR_COLUMNS)
    }
    table = pa.table({KEY: pa.array(rows.keys, pa.string()), LABEL: pa.array(rows.labels, pa.int64()), **columns})
    table = table.replace_schema_metadata(info.to_metadata())
    # One record batch a shard: a column is then one contiguous block that numpy views without a copy.
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(len(rows.keys), 1))
    return len(rows.keys)


def write_latent_tar(path: Path, rows: LatentRows) -> int:
    """Write the WebDataset twin of an Arrow shard: the same rows in the same order, npy and json members only."""

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for key, label, posterior in zip(rows.keys, rows.labels, rows.posterior, strict=True):
            about = json.dumps({"key": key, "label": int(label)}, sort_keys=True).encode()
            yield (
                key,
                {LATENT_TAR_MEMBER: npy_bytes(posterior), JSON_MEMBER: about, CLASS_MEMBER: b"%d" % label},
            )

    return write_tar(path, samples())


class LatentShard:
    """A memory-mapped Arrow shard. `columns[i]` is float32 [N, C*h*h], a view of the file."""

    def __init__(self, path: Path) -> None:
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is not a whole Arrow file ({error}); encode the images again") from error
        self.info = LatentInfo.from_metadata(table.schema.metadata, str(path))
        self.keys = table.column(KEY)
        self.labels: NDArray[np.int64] = table.column(LABEL).to_numpy()
        self.columns = [_matrix(table.column(name)) for name in POSTERIOR_COLUMNS]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self) -> LatentRows:
        """The whole shard, copied."""
        posterior = np.stack(self.columns, axis=1).reshape(len(self), len(self.columns), *self.info.latent_shape)
        return LatentRows(tuple(self.keys.to_pylist()), self.labels, posterior)


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    # Our writer makes one chunk, which is viewed in place; combining chunks copies even a single one.
    values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    flat: NDArray[np.float32] = values.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(values), values.type.list_size)


class LatentDataset:
    """All latent shards of an artifact as one indexable table, in order of shard and row."""

    def __init__(self, paths: Sequence[Path]) -> None:
        if not paths:
            raise UserError("no latent shards given; encode the images first")
        self.shards = [LatentShard(path) for path in paths]
        self.info = self.shards[0].info
        for path, shard in zip(paths, self.shards, strict=True):
            if _shared(shard.info) != _shared(self.info):
                raise UserError(f"{path} was encoded as {_shared(shard.info)}, {paths[0]} as {_shared(self.info)}")
        self.starts = np.cumsum([0, *(len(shard) for shard in self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def gather(
        self, indices: NDArray[np.int64], mirror: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Posterior mean and std, float32 [n, C, h, h], and labels int64 [n] of rows; mirrored where `mirror`."""
        width = int(np.prod(self.info.latent_shape))
        mean, std = (np.empty((len(indices), width), dtype=np.float32) for _ in range(2))
        labels = np.empty(len(indices), dtype=np.int64)
        places = np.searchsorted(self.starts, indices, side="right") - 1
        for place in np.unique(places):
            shard, here = self.shards[place], places == place
            rows = indices[here] - self.starts[place]
            labels[here] = shard.labels[rows]
            for side in (0, 1):
                of_side = here & (mirror == bool(side))
                rows = indices[of_side] - self.starts[place]
                mean[of_side] = shard.columns[2 * side][rows]
                std[of_side] = shard.columns[2 * side + 1][rows]
        shape = (len(indices), *self.info.latent_shape)
        return mean.reshape(shape), std.reshape(shape), labels


def _shared(info: LatentInfo) -> tuple[str, float, int, tuple[int, int, int]]:
    return info.autoencoder, info.scaling_factor, info.image_size, info.latent_shape

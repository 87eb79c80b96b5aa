"""What a latent shard states of itself, and the columns that it must have.

Legend: C latent channels, h latent height and width.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pyarrow as pa

from edt_core.data.latents.number_format import NUMBER_FORMATS, NumberFormat
from edt_core.data.scale import SCALE_FIELDS, LatentScale
from edt_core.errors import UserError
from edt_core.store.layout import (
    CENTRED_LATENT_SCHEMA_VERSION,
    HALF_LATENT_SCHEMA_VERSION,
    KEY,
    LABEL,
    LATENT_ROWS_PER_BATCH,
    LATENT_SCHEMA_VERSION,
    POSTERIOR_COLUMNS,
    ROUNDING,
)


@dataclass(frozen=True)
class LatentInfo:
    """The metadata of a latent shard."""

    autoencoder: str
    scale: LatentScale
    image_size: int
    latent_shape: tuple[int, int, int]  # C, h, h
    source_shard: str = ""
    store: str = "fp32"  # the numbers of the posteriors: a name of NUMBER_FORMATS

    @property
    def numbers(self) -> NumberFormat:
        """The format of the posteriors' numbers."""
        return NUMBER_FORMATS[self.store]

    @property
    def schema_version(self) -> str:
        if self.numbers.is_half:
            return HALF_LATENT_SCHEMA_VERSION
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
            **({"store": self.store} if self.numbers.is_half else {}),
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
            expected = info.schema_version
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{where} is not a latent shard: its Arrow schema lacks {error}; encode the images"
            ) from error
        if version != expected:
            raise UserError(
                f"{where} has latent schema {version}, and expected is {expected} ({LATENT_SCHEMA_VERSION}; "
                f"{CENTRED_LATENT_SCHEMA_VERSION} for centred latents; {HALF_LATENT_SCHEMA_VERSION} in half "
                "precision); encode the images again"
            )
        return info

    @property
    def encoding(self) -> tuple[str, dict[str, Any], int, tuple[int, int, int], str]:
        """The values that all shards of one artifact share."""
        return self.autoencoder, self.scale.record(), self.image_size, self.latent_shape, self.store


def latent_schema(info: LatentInfo) -> pa.Schema:
    """The Arrow schema of a shard."""
    side = pa.list_(info.numbers.column, 2 * prod(info.latent_shape))
    fields = [(KEY, pa.string()), (LABEL, pa.int64()), *((name, side) for name in POSTERIOR_COLUMNS)]
    if info.numbers.is_half:
        fields.append((ROUNDING, pa.list_(pa.float32(), 2 * info.latent_shape[0])))
    return pa.schema(fields, metadata=info.to_metadata())


def check_layout(path: Path, schema: pa.Schema, batches: list[pa.RecordBatch], expected: pa.Schema) -> None:
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

"""Rows of earlier latent shards: an image whose original, pixels and autoencoder are unchanged is not encoded again.

Legend: n rows of an image shard, C latent channels, h latent side.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edt_core.config import EncodeConfig, result_fields
from edt_core.data.latents import LatentShard, NumberFormat
from edt_core.data.shards import ImageSample, image_sample
from edt_core.data.tar_members import TarRows
from edt_core.environment import environment
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact, ArtifactWriter, ManifestError
from edt_core.store.folder import Folder
from edt_core.store.layout import CLASS_MEMBER, LATENT_ROWS_PER_BATCH, LATENT_SHARD
from jobs.stages.reuse.images import pixels_of
from jobs.stages.reuse.originals import row_places
from jobs.stages.reuse.siblings import Places, WrongRowError, same_device, siblings
from jobs.stages.stage import device_kind

_LIBRARIES = ("machine", "torch", "diffusers")
# On a GPU, by precision: how far two computations of a latent may differ, in standard deviations of its image,
# because the batch around it differs. On a CPU they are equal.
GPU_TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 2e-2, "bf16": 1e-1}


class Batch(NamedTuple):
    """Rows of a shard: keys, labels int64 [n], posterior float32 [n, 2, 2, C, h, h].

    rounding: float32 [n, 2, C], what was lost of rows that were stored in half precision before; None for none.
    """

    keys: list[str]
    labels: NDArray[np.int64]
    posterior: NDArray[np.float32]
    rounding: NDArray[np.float32] | None = None


class Row(NamedTuple):
    """A row: posterior float32 [2, 2, C, h, h], and what half precision lost of it, float32 [2, C]."""

    posterior: NDArray[np.float32]
    rounding: NDArray[np.float32]


def earlier_latents(
    out: ArtifactWriter, config: EncodeConfig, version: int, images: Artifact, autoencoder: Artifact
) -> list[Places | None]:
    """Where the latents of each image shard are in earlier artifacts; None for a shard that is in none.

    An artifact is used if it was made by the same weights, fields and libraries, and if the image artifact it was made
    of is still in the store and has the same pixels for the same original. Latents in float32 serve every
    `encode.store`: rounding them is all that an encoding would do with them.
    """
    wanted, pixels, here = _fields(result_fields(config)), pixels_of(images), environment()
    device = device_kind(config.num_gpus_per_worker)

    def is_usable(artifact: Artifact) -> bool:
        manifest = artifact.manifest
        return (
            manifest.step_version == version
            and _fields(manifest.config) == wanted
            and manifest.config.get("store", "fp32") in ("fp32", config.store)
            and manifest.counts.get("autoencoder_digest") == autoencoder.manifest.digest
            and same_device(artifact, device)
            and all(manifest.environment.get(name) == here.get(name) for name in _LIBRARIES)
            and (source := images_of(artifact)) is not None
            and pixels_of(source) == pixels
        )

    found = siblings(out, is_usable)
    pairs = [(artifact, source) for artifact in found if (source := images_of(artifact)) is not None]
    return row_places(images, pairs, LATENT_SHARD)


def _fields(fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("write_webdataset", "store")}


def images_of(artifact: Artifact) -> Artifact | None:
    """The image artifact that an artifact of the same store was made of, or None if it is missing or damaged."""
    kind = artifact.folder.uri.rpartition("/")[0]
    folder = Folder(f"{kind.rpartition('/')[0]}/images/{artifact.manifest.inputs.get('images')}")
    with suppress(ManifestError):
        return Artifact.open(folder)
    return None


class ShardImages:
    """The samples of an image shard by row. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, TarRows(path)

    def __enter__(self) -> "ShardImages":
        return self

    def __exit__(self, *_: object) -> None:
        self.rows.close()

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self, rows: slice) -> list[str]:
        """The keys of some rows."""
        return self.rows.keys[rows]

    def labels(self, rows: slice) -> NDArray[np.int64]:
        """The labels of some rows, int64 [n]."""
        numbers = range(*rows.indices(len(self.rows)))
        return np.array([int(bytes(self.rows[row][CLASS_MEMBER])) for row in numbers], dtype=np.int64)

    def samples(self, rows: Sequence[int]) -> Iterator[ImageSample]:
        """The samples of these rows, in order. Raises UserError if one lacks a member."""
        for row in rows:
            members = {name: bytes(data) for name, data in self.rows[row].items()}
            yield image_sample(self.rows.keys[row], members, self.path)


class EarlierLatents:
    """Reads rows of earlier latent shards; each file is verified once on this node."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._open: dict[tuple[int, int], LatentShard] = {}

    def row(self, position: int) -> Row:
        """The row of this position. Raises WrongRowError if its shard cannot be used."""
        return self._read(position)[0]

    def _read(self, position: int) -> tuple[Row, NumberFormat]:
        """The row, and the numbers that it was stored in."""
        index, shard = int(self.places.artifact[position]), int(self.places.shard[position])
        try:
            if (index, shard) not in self._open:
                self._open[index, shard] = _verified(self.places.artifacts[index], LATENT_SHARD.format(shard))
            latents, place = self._open[index, shard], int(self.places.row[position])
            chunk, row = divmod(place, LATENT_ROWS_PER_BATCH)
            stored = np.stack([side[row] for side in latents.chunks[chunk]]).reshape(2, 2, *latents.info.latent_shape)
            return Row(latents.info.numbers.widened(stored), latents.rounding[place]), latents.info.numbers
        except (OSError, UserError, IndexError) as error:
            raise WrongRowError(self.places.where(position, LATENT_SHARD, f"cannot be read ({error})")) from error

    def check(self, position: int, posterior: NDArray[np.float32], tolerance: float) -> Row:
        """The row of this position, compared with what was computed now. Raises WrongRowError if they differ.

        tolerance: in standard deviations of the computed values; 0 for equal bytes. With a tolerance, a row in half
        precision may also differ by one number of that precision, which the rounding of close values can.
        """
        earlier, numbers = self._read(position)
        if earlier.posterior.shape == posterior.shape:
            computed = numbers.widened(numbers.narrowed(posterior, "the computed latents"))
            spacing = numbers.spacing if tolerance and numbers.is_half else 0.0
            allowed = tolerance * float(posterior.std()) + spacing * np.abs(computed)
            gap = np.abs(earlier.posterior - computed)
            if earlier.posterior.tobytes() == computed.tobytes() or (gap <= allowed).all():
                return earlier
        raise WrongRowError(self.places.where(position, LATENT_SHARD, "differs from what is computed of its image now"))


def _verified(artifact: Artifact, name: str) -> LatentShard:
    whole = Artifact.read(artifact.folder)  # a slice of places lists only some of its files
    whole.verify_once(name)
    return LatentShard(whole.path(name))


def merged_rows(
    images: ShardImages, places: Places, read: NDArray[np.bool_], computed: Iterator[NDArray[np.float32]], gap: float
) -> Iterator[Batch]:
    """All rows of a shard in order: earlier ones, and computed ones where `read` is true.

    computed: posterior [2, 2, C, h, h] of each row that is read, in order. Where a row is both, they are compared with
    the tolerance `gap`, and the earlier one is used. Raises WrongRowError.
    """
    earlier, reused = EarlierLatents(places), places.reused
    for first in range(0, len(reused), LATENT_ROWS_PER_BATCH):
        part = slice(first, min(first + LATENT_ROWS_PER_BATCH, len(reused)))
        rows = []
        for position in range(part.start, part.stop):
            if not read[position]:
                rows.append(earlier.row(position))
            else:
                posterior = next(computed)
                fresh = Row(posterior, np.zeros((2, posterior.shape[2]), np.float32))
                rows.append(earlier.check(position, posterior, gap) if reused[position] else fresh)
        posteriors, roundings = (np.stack(parts) for parts in zip(*rows, strict=True))
        yield Batch(images.keys(part), images.labels(part), posteriors, roundings)

"""Features of real images by row, and rows of them from earlier references: same original, pixels and network.

Legend: n rows of an image shard, D features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.cpu_units import whole_units
from edt_core.environment import environment
from edt_core.errors import UserError
from edt_core.files.tensor_files import load_tensors
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.cache import local_copy
from edt_core.store.folder import sha256_file
from edt_core.store.layout import IMAGE_FEATURES, IMAGE_SHARD
from jobs.stages.reuse.images import pixels_of
from jobs.stages.reuse.latents import ShardImages, images_of
from jobs.stages.reuse.originals import row_places
from jobs.stages.reuse.siblings import Places, WrongRowError, checked_rows, reuse_record, same_device, siblings

_LIBRARIES = ("machine", "torch", "transformers")
_KEPT = ("features", "spatial")  # what statistics are made of; a reference needs no probabilities
GPU_TOLERANCE = 1e-3  # in standard deviations of a row: features are float32 on every device
Arrays = dict[str, NDArray[np.float32]]
Extract = Callable[[NDArray[np.uint8]], Arrays]


def earlier_features(
    out: ArtifactWriter, version: int, images: Artifact, digests: Mapping[str, str], device: str
) -> dict[str, list[Places | None]]:
    """Where the features of each image shard are in earlier references, by feature space.

    digests: the digest of each space's network. References of older versions, which keep no features by row, have none.
    """
    here, pixels = environment(), pixels_of(images)

    def is_usable(artifact: Artifact) -> bool:
        manifest = artifact.manifest
        return (
            manifest.step_version == version
            and bool(artifact.entries(IMAGE_FEATURES.format(0)))
            and same_device(artifact, device)
            and all(manifest.environment.get(name) == here.get(name) for name in _LIBRARIES)
            and (source := images_of(artifact)) is not None
            and pixels_of(source) == pixels
        )

    found = [(item, source) for item in siblings(out, is_usable) if (source := images_of(item)) is not None]
    places: dict[str, list[Places | None]] = {}
    for space, digest in digests.items():
        pairs = [pair for pair in found if pair[0].counts["extractors"].get(space) == digest]
        places[space] = row_places(images, pairs, IMAGE_FEATURES)
    return places


def features_record(shards: Mapping[str, Mapping[int, Places]], fingerprint: str) -> dict[str, Any] | None:
    """`reuse_record` of all feature spaces together: a row is the features of one image in one space."""
    records = [record for places in shards.values() if (record := reuse_record(places, fingerprint)) is not None]
    if not records:
        return None
    by_artifact: dict[str, int] = {}
    for record in records:
        for name, rows in record["from"].items():
            by_artifact[name] = by_artifact.get(name, 0) + rows
    totals = {key: sum(record[key] for record in records) for key in ("rows", "checked")}
    return {**totals, "from": dict(sorted(by_artifact.items()))}


@dataclass(frozen=True)
class FeatureFiles:
    """Writes a file of features for each image shard: computed, or copied from earlier references.

    extractors: space -> network. earlier: space -> places of each shard. on_images(n): n more images were extracted.
    """

    images: Artifact
    extractors: Mapping[str, Extract]
    earlier: Mapping[str, Sequence[Places | None]]
    out: ArtifactWriter
    batch_size: int
    on_cpu: bool
    on_images: Callable[[int], None]

    def make(self, number: int) -> tuple[dict[str, Arrays], bool]:
        """The features of shard `number` by space, and whether an earlier attempt had made its file.

        Raises WrongRowError if a row of an earlier reference differs from what is computed now.
        """
        from safetensors.numpy import save

        name = IMAGE_FEATURES.format(number)
        if self.out.recover(name) is not None:
            return _by_space(load_tensors(local_copy(self.out.data, name), "numpy")), True
        shard = IMAGE_SHARD.format(number)
        (entry,) = self.images.entries(shard)
        if sha256_file(self.images.path(shard)) != entry.sha256:  # a wrong row would be copied forever
            raise UserError(
                f"{self.images.path(shard)} does not match its manifest (another sha256); run preprocess again"
            )
        with ShardImages(self.images.path(shard)) as images:
            found = self._extracted(number, images)
            rows = len(images)
        tensors = {f"{space}.{name}": array for space, arrays in found.items() for name, array in arrays.items()}
        self.out.write_bytes(name, save(tensors), rows)
        return found, False

    def _extracted(self, number: int, images: ShardImages) -> dict[str, Arrays]:
        places = {space: self.earlier[space][number] if self.earlier else None for space in self.extractors}
        read = {space: self._rows_to_read(item, len(images), number) for space, item in places.items()}
        computed = self._computed(images, read)
        gap = 0.0 if self.on_cpu else GPU_TOLERANCE
        return {
            space: arrays
            for space, item in places.items()
            if (arrays := merged_features(space, item, read[space], computed[space], gap))
        }

    def _rows_to_read(self, places: Places | None, rows: int, number: int) -> NDArray[np.bool_]:
        if places is None or len(places.reused) != rows:
            return np.ones(rows, np.bool_)
        return ~places.reused | checked_rows(places.reused, self.out.fingerprint, number)

    def _computed(self, images: ShardImages, read: Mapping[str, NDArray[np.bool_]]) -> dict[str, Arrays]:
        """The features of the rows that are read, joined: sums of them do not depend on the batch size."""
        parts: dict[str, list[Arrays]] = {space: [] for space in read}
        for rows, pixels in self._batches(images, np.flatnonzero(np.any(list(read.values()), axis=0))):
            for space, extract in self.extractors.items():
                if (wanted := read[space][rows]).any():
                    parts[space].append(extract(pixels[wanted]))
            self.on_images(len(rows))
        return {space: _joined(found) for space, found in parts.items()}

    def _batches(
        self, images: ShardImages, rows: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        from edt_core.data.prefetch import in_batches, prefetched

        size = whole_units(self.batch_size) if self.on_cpu else self.batch_size
        pixels = (sample.pixels() for sample in images.samples(rows.tolist()))
        batches = prefetched((np.stack(batch) for batch in in_batches(pixels, size)), 1)
        for first, batch in zip(range(0, len(rows), size), batches, strict=True):
            yield rows[first : first + size], batch


def _by_space(tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, Arrays]:
    spaces: dict[str, Arrays] = {}
    for name, array in tensors.items():
        space, _, kind = name.rpartition(".")
        spaces.setdefault(space, {})[kind] = array
    return spaces


def _joined(parts: Sequence[Arrays]) -> Arrays:
    names = [name for name in _KEPT if parts and name in parts[0]]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def merged_features(space: str, places: Places | None, read: NDArray[np.bool_], computed: Arrays, gap: float) -> Arrays:
    """All rows of a shard: the computed ones where `read` is true, earlier ones elsewhere.

    Where a row is both, they are compared with the tolerance `gap` (in standard deviations of the row; 0 for equal
    bytes), and the earlier one is used. Raises WrongRowError if they differ.
    """
    if places is None or len(places.reused) != len(read):
        return computed
    earlier = _earlier_arrays(space, places)
    merged: Arrays = {}
    for name, array in earlier.items():
        new = np.zeros((len(read), array.shape[1]), np.float32)
        if read.any():
            new[read] = computed[name]
        for position in np.flatnonzero(read & places.reused):
            one, other = new[position], array[position]
            is_same = one.tobytes() == other.tobytes() or float(np.abs(one - other).max()) <= gap * float(one.std())
            if not is_same:
                problem = f"({space}) differs from what is computed of its image now"
                raise WrongRowError(places.where(int(position), IMAGE_FEATURES, problem))
        merged[name] = np.where(places.reused[:, None], array, new)
    return merged


def _earlier_arrays(space: str, places: Places) -> Arrays:
    """The earlier features of every reused row, in place; zeros elsewhere. Raises WrongRowError."""
    arrays: Arrays = {}
    for index, item in enumerate(places.artifacts):
        of_item = places.artifact == index
        for shard in np.unique(places.shard[of_item]).tolist():
            positions = np.flatnonzero(of_item & (places.shard == shard))
            try:
                tensors = _by_space(_verified_tensors(item, IMAGE_FEATURES.format(shard)))[space]
                for name, values in tensors.items():
                    target = arrays.setdefault(name, np.zeros((len(places.reused), values.shape[1]), np.float32))
                    target[positions] = values[places.row[positions]]
            except (OSError, UserError, KeyError, IndexError, ValueError) as error:
                message = places.where(int(positions[0]), IMAGE_FEATURES, f"cannot be read ({error})")
                raise WrongRowError(message) from error
    return arrays


def _verified_tensors(artifact: Artifact, name: str) -> dict[str, Any]:
    whole = Artifact.read(artifact.folder)  # a slice of places lists only some of its files
    whole.verify_once(name)
    return load_tensors(whole.path(name), "numpy")

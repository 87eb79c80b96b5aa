"""The images and losses of a report, read from artifacts.

Only what is shown stays in memory, for a data set of any size: files are read one by one, and only as far as needed.
Shapes: S image size, D features, T timesteps; images are uint8 RGB [N, S, S, 3] with labels int64 [N].
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.config import SampleConfig
from edt_core.files.tensor_files import load_tensors, opened_tensors
from edt_core.sampling.grid import MAX_CLASSES
from edt_core.store.artifact import Artifact
from edt_core.store.layout import CHECKPOINTS, FEATURE_UNIT, REFERENCE_NAME, TIMESTEP_STATE
from jobs.stages.autoencoder import IMAGE_SHARDS
from jobs.stages.sample import FEATURE_UNITS, units_per_repeat

PER_CLASS = 8  # images shown per class, at most
NEIGHBOURS = 3  # real images shown per generated image
_SAMPLES_WITH_NEIGHBOURS = 20  # few: each neighbour may be in another shard, and each shard a download
_MOST_MEASURED = 1000  # generated and real images in the statistics of nearest distances
_MOST_REAL = 50_000  # real images to search
_BLOCK = 4096  # rows of features in memory at once

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Samples:
    """The first images of each class in sample order, with features [N, D]. `measured`: those of the first samples.

    Features are None if no space was requested.
    """

    images: Array
    labels: Array
    features: Array | None = None
    measured: Array | None = None


def read_samples(features: Artifact, drawn: Array, space: str | None = None) -> Samples:
    """Up to PER_CLASS stored images of each of the first classes, from the first repeat of a features artifact.

    drawn: the classes that have samples. With `space`, also their features in that space, and the features of the first
    _MOST_MEASURED samples.
    """
    shown: list[tuple[Array, Array, Array | None]] = []  # images, labels and features of each unit
    measured: list[Array] = []
    counts = np.full(MAX_CLASSES, PER_CLASS)
    counts[drawn[drawn < MAX_CLASSES]] = 0
    for path in _units(features):
        with opened_tensors(path, "numpy") as file:
            images = file.get_tensor("images") if "images" in file.keys() else None  # noqa: SIM118  it is no dict
            unit_features = file.get_tensor(f"{space}.features") if space else None
            labels = file.get_tensor("labels")
        if images is not None:
            places = _places_to_show(labels[: len(images)], counts)
            shown.append((images[places], labels[places], None if unit_features is None else unit_features[places]))
        measured += [] if unit_features is None else [unit_features]
        all_shown = images is None or (counts == PER_CLASS).all()
        if all_shown and (unit_features is None or sum(map(len, measured)) >= _MOST_MEASURED):
            break
    pixels, classes, rows = zip(*shown, strict=True)
    if space is None:
        return Samples(np.concatenate(pixels), np.concatenate(classes))
    first = np.concatenate(measured)[:_MOST_MEASURED]
    return Samples(np.concatenate(pixels), np.concatenate(classes), np.concatenate(rows), first)


def _places_to_show(labels: Array, counts: Array) -> list[int]:
    """Positions of the labels that have fewer than PER_CLASS images so far. Updates these `counts` [classes]."""
    places = []
    for place, label in enumerate(labels.tolist()):
        if label < len(counts) and counts[label] < PER_CLASS:
            counts[label] += 1
            places.append(place)
    return places


def _units(features: Artifact) -> Iterator[Any]:
    """Local paths of the units of the first repeat, in sample order."""
    config = SampleConfig.model_validate(features.manifest.config)
    features.verify_once(FEATURE_UNITS)
    for number in range(units_per_repeat(config)):
        yield features.path(FEATURE_UNIT.format(number))


def real_images(images: Artifact, class_counts: Iterable[int] | None = None) -> tuple[Array, Array]:
    """Up to PER_CLASS images of each of the first classes, in class order: [N, S, S, 3] and labels [N].

    With `class_counts`, the numbers of images per class, reading stops after the last image to show.
    """
    from edt_core.data.shards import read_image_shard

    counts = list(class_counts or [])[:MAX_CLASSES]
    most = {label: min(PER_CLASS, count) for label, count in enumerate(counts)}
    missing = sum(most.values()) if counts else MAX_CLASSES * PER_CLASS
    by_class: dict[int, list[Array]] = {}
    for entry in images.entries(IMAGE_SHARDS):
        if not missing:
            break
        for sample in read_image_shard(images.path(entry.path)):
            shown = by_class.setdefault(sample.label, []) if sample.label < MAX_CLASSES else None
            if shown is not None and len(shown) < most.get(sample.label, PER_CLASS):
                shown.append(sample.pixels())
                missing -= 1
    labels = [label for label, shown in sorted(by_class.items()) for _ in shown]
    return np.stack([pixels for _, shown in sorted(by_class.items()) for pixels in shown]), np.asarray(labels)


# Nearest neighbours


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """Generated images [n, S, S, 3], each with its k nearest real ones [n, k, S, S, 3], their classes and distances.

    generated_nearest, real_nearest: distance to the nearest real image, of the first generated images and of real
    images (not to themselves). searched, total: the number of real images that were searched, and of all real images.
    """

    space: str
    samples: Array
    labels: Array
    real: Array
    real_labels: Array
    distances: Array
    generated_nearest: Array
    real_nearest: Array
    searched: int
    total: int


def no_neighbours(space: str, samples: Samples, features: Artifact, reference: Artifact, images: Artifact) -> str:
    """Why the stored features do not allow a search for neighbours; "" if they do."""
    if not len(samples.images):
        return f"No stored sample image belongs to one of the first {MAX_CLASSES} classes."
    if min(images.counts["images"], reference.manifest.config["keep_features"]) < 2:
        return "Features of fewer than two real images are stored, so there is nothing to compare with."
    if reference.counts["source"] != "images" or reference.counts["content"] != images.manifest.digest:
        return (
            f"The metrics' reference is {reference.counts['source']}, without features of the training images. "
            "With reference_statistics: null, the reference is computed from the training images."
        )
    if features.counts["extractors"].get(space) != reference.counts["extractors"].get(space, ""):
        return f"The features of generated and real images in the space {space} come from different networks."
    return ""


def find_neighbours(space: str, samples: Samples, reference: Artifact, images: Artifact) -> Neighbourhood:
    """The nearest real images of some samples, among those whose features are in the reference artifact."""
    from edt_core.evaluation.metrics import nearest_neighbours

    assert samples.features is not None
    assert samples.measured is not None
    queried = _first_of_each_class(samples.labels)
    real = _RealFeatures.of(reference, space)
    own = kept_rows(len(real.rows), _MOST_MEASURED)
    queries = np.concatenate([samples.features[queried], samples.measured])
    nearest = nearest_neighbours(queries, real.blocks(), min(NEIGHBOURS, len(real.rows)))
    others = nearest_neighbours(real.take(own), real.blocks(), 1, own_rows=own)
    rows, distances = nearest.rows[: len(queried)], nearest.distances[: len(queried)]
    numbers = real.image_numbers[rows]
    pictures = _images_at(images, numbers.ravel())
    return Neighbourhood(
        space=space,
        samples=samples.images[queried],
        labels=samples.labels[queried],
        real=np.stack([np.stack([pictures[number][0] for number in row]) for row in numbers.tolist()]),
        real_labels=np.array([[pictures[number][1] for number in row] for row in numbers.tolist()]),
        distances=distances,
        generated_nearest=nearest.distances[len(queried) :, 0],
        real_nearest=others.distances[:, 0],
        searched=len(real.rows),
        total=reference.counts["images"],
    )


def kept_rows(total: int, limit: int) -> NDArray[np.int64]:
    """The rows of 0..total-1 that `at_even_distances` selects, in order."""
    number = min(limit, total)
    return -(-np.arange(1, number + 1) * total // max(1, number)) - 1  # rounded up: the first row that makes it k + 1


@dataclass(frozen=True, eq=False)
class _RealFeatures:
    """Features of real images in a file: the rows to search, and the image number of each."""

    path: Any
    name: str
    rows: NDArray[np.int64]
    image_numbers: NDArray[np.int64]

    @classmethod
    def of(cls, reference: Artifact, space: str) -> "_RealFeatures":
        reference.verify_once(REFERENCE_NAME)
        path, name = reference.path(REFERENCE_NAME), f"{space}.features"
        with opened_tensors(path, "numpy") as file:
            stored = file.get_slice(name).get_shape()[0]
        rows = kept_rows(stored, _MOST_REAL)
        return cls(path, name, rows, kept_rows(reference.counts["images"], stored)[rows])

    def blocks(self) -> Iterator[Array]:
        """The rows to search, in blocks [m, D]."""
        with opened_tensors(self.path, "numpy") as file:
            features = file.get_slice(self.name)
            stored = features.get_shape()[0]
            for start in range(0, stored, _BLOCK):
                inside = self.rows[(self.rows >= start) & (self.rows < start + _BLOCK)]
                if len(inside):
                    yield features[start : min(start + _BLOCK, stored)][inside - start]

    def take(self, places: NDArray[np.int64]) -> Array:
        """The features at some positions among the rows to search, in order."""
        first, parts = 0, []
        for block in self.blocks():
            inside = places[(places >= first) & (places < first + len(block))]
            parts.append(block[inside - first])
            first += len(block)
        return np.concatenate(parts)


def _first_of_each_class(labels: Array) -> NDArray[np.int64]:
    """Positions of the first samples of each class, by class: two per class, or one if there are many classes."""
    classes = np.unique(labels)
    each = min(2, max(1, _SAMPLES_WITH_NEIGHBOURS // len(classes)))
    return np.concatenate([np.flatnonzero(labels == label)[:each] for label in classes])


def _images_at(images: Artifact, numbers: Iterable[int]) -> dict[int, tuple[Array, int]]:
    """Pixels and class of images by image number, which counts in the order of the shards."""
    from edt_core.data.shards import read_image_shard

    requested, first, pictures = {int(number) for number in numbers}, 0, dict[int, tuple[Array, int]]()
    for entry in images.entries(IMAGE_SHARDS):
        places = {number - first for number in requested if first <= number < first + (entry.rows or 0)}
        if places:
            for place, sample in enumerate(read_image_shard(images.path(entry.path))):
                if place in places:
                    pictures[first + place] = sample.pixels(), sample.label
                if place == max(places):
                    break
        first += entry.rows or 0
    return pictures


# Losses


def timestep_losses(checkpoint: Artifact) -> NDArray[np.float64] | None:
    """Mean of the last losses at each timestep, [T], NaN if there is none, from the state of the timestep sampler.

    Losses of the full and the masked pass together, without importance weights. None if the sampler stores no losses:
    a uniform sampler, or that of an untrained model.
    """
    newest = f"{CHECKPOINTS}/{checkpoint.counts['checkpoints'][-1]}"  # `final` may be a folder of weights alone
    state: Mapping[str, Array] = load_tensors(checkpoint.path(f"{newest}/{TIMESTEP_STATE}"), "numpy")
    if "losses" not in state or not state["counts"].any():
        return None
    seen = np.minimum(state["counts"], state["losses"].shape[1])
    sums = state["losses"].sum(axis=1)  # unused places of the ring buffer are 0
    return np.divide(sums, seen, out=np.full(len(sums), np.nan), where=seen > 0)

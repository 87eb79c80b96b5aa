"""reference: statistics of the real images in each feature space, which metrics compare samples with.

The artifact contains the Gaussian of all images, and the features of an evenly spaced subset for metrics that compare
pairs, such as kid. Published statistics of ADM can replace the images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edt_core.config import ReferenceConfig
from edt_core.data.subsets import at_even_distances
from edt_core.errors import UserError
from edt_core.evaluation.extractors import EXTRACTORS, INCEPTION
from edt_core.files.place_names import typed_path
from edt_core.files.tensor_files import load_tensors
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter, Source
from edt_core.store.cache import local_copy
from edt_core.store.folder import sha256_file
from edt_core.store.layout import IMAGE_FEATURES, REFERENCE_NAME
from jobs.runtime.cluster import require, use_threads
from jobs.runtime.devices import device_name, kind_of_devices
from jobs.runtime.pool import pooled
from jobs.stages import extractors
from jobs.stages.autoencoder import IMAGE_SHARDS
from jobs.stages.reuse.features import FeatureFiles, earlier_features, features_record
from jobs.stages.reuse.siblings import Places, WrongRowError, discard_files, message_of
from jobs.stages.stage import DEVICE, REUSED, Stage, device_kind

_PARTS, _PART = "parts", "parts/part-{:05d}.safetensors"
_MOST_PARTS = 64  # a part contains a D x D matrix of each space, 34 MB for Inception, until all are merged
_ADM_CHUNK = 64

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """Numbers of some consecutive image shards, and that of their first image among all."""

    shards: tuple[int, ...]
    first: int


class PartMade(NamedTuple):
    """A finished part: images, shards made by this attempt, torch device, and the problem of a wrong row or ""."""

    images: int
    shards: list[int]
    device: str
    problem: str = ""


def parts_of(images: Artifact) -> list[Part]:
    """The shards in at most _MOST_PARTS parts. They depend only on the artifact, so that results are reproducible."""
    shards = images.entries(IMAGE_SHARDS)
    size = -(-len(shards) // _MOST_PARTS)
    starts = np.concatenate([[0], np.cumsum([shard.rows or 0 for shard in shards])])
    return [Part(tuple(range(k, min(k + size, len(shards)))), int(starts[k])) for k in range(0, len(shards), size)]


class Extraction:
    """Loads every network once, then extracts features part by part."""

    def __init__(
        self,
        config: ReferenceConfig,
        inputs: Mapping[str, Artifact | Source],
        parts: list[Part],
        out: ArtifactWriter,
        progress: Progress,
        earlier: Mapping[str, Sequence[Places | None]] = {},
    ) -> None:
        from edt_core.precision import use_precision

        use_threads(config.num_cpus_per_worker)
        use_precision("fp32")
        self.config, self.out, self.parts, self.progress = config, out, parts, progress
        images = inputs["images"]
        assert isinstance(images, Artifact)
        self.total, self.done = images.counts["images"], 0
        self.device = device = device_name(config.num_gpus_per_worker)
        spaces = extractors.spaces_of(inputs)
        self.extractors = {space: extractors.load(space, inputs[space], device) for space in spaces}
        self.files = FeatureFiles(
            images, self.extractors, earlier, out, config.batch_size, device == "cpu", self._on_images
        )

    def work(self, number: int) -> "PartMade":
        """Extract part `number`.

        The problem of a wrong row of earlier features is not raised: an error would end the other workers, one of which
        may be writing a file.
        """
        from safetensors.numpy import save

        self.part, self.done = number, 0
        try:
            tensors, rows, made = self._extract(number)
        except WrongRowError as error:
            return PartMade(0, [], self.device, str(error))
        self.out.write_bytes(_PART.format(number), save(tensors), rows)
        return PartMade(rows, made, self.device)

    def _on_images(self, number: int) -> None:
        self.done += number
        self.progress.update(self.done, self.total, "images", part=self.part)

    def _extract(self, number: int) -> tuple[Tensors, int, list[int]]:
        done, part, made = 0, self.parts[number], list[int]()
        sums = Sums()
        subset: dict[str, list[NDArray[np.float32]]] = {space: [] for space in self.extractors}
        for shard in part.shards:
            found, is_recovered = self.files.make(shard)
            made += [] if is_recovered else [shard]
            count = len(next(iter(found.values()))["features"]) if found else 0
            rows = evenly_spaced(part.first + done, count, self.total, self.config.keep_features)
            for space, arrays in found.items():
                sums.add(space, arrays)
                subset[space].append(arrays["features"][rows])
            done += count
            self.progress.update(done, self.total, "images", part=number)
        features = {f"{space}.features": np.concatenate(blocks) for space, blocks in subset.items() if blocks}
        return {**sums.tensors(), **features}, done, made


class Sums:
    """Mergeable statistics by key: `<space>` of a space's features, `<space>.spatial` of its spatial ones."""

    def __init__(self) -> None:
        self.statistics: dict[str, Any] = {}

    def add(self, space: str, output: Mapping[str, NDArray[np.float32]]) -> None:
        """Add the output of an extractor for a batch."""
        from edt_core.evaluation.metrics import FeatureStatistics

        for name, key in (("features", space), ("spatial", f"{space}.spatial")):
            if name in output:
                self.merge(key, FeatureStatistics.from_features(output[name], f"{space} reference"))

    def merge(self, key: str, statistics: Any) -> None:
        previous = self.statistics.get(key)
        self.statistics[key] = statistics if previous is None else previous.merge(statistics)

    def tensors(self) -> Tensors:
        """The sums as named arrays."""
        return {f"{key}.{n}": v for key, sums in self.statistics.items() for n, v in sums.to_arrays().items()}


def evenly_spaced(first: int, count: int, total: int, limit: int) -> list[int]:
    """Which of rows first..first+count-1 out of `total` are in an evenly spaced subset of `limit`; counted from 0."""
    return [row for row in range(count) if at_even_distances(first + row, total, limit)]


def reference(
    config: ReferenceConfig, inputs: Mapping[str, Artifact | Source], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Compute the statistics and features of real images, or take ADM's, for each feature network.

    `inputs["images"]` is an images artifact or ADM's .npz. Raises UserError if there is no feature network, or none
    that matches the published statistics.
    """
    spaces = extractors.spaces_of(inputs)
    if not spaces:
        raise UserError(f"there is no feature network: pass at least one of {', '.join(EXTRACTORS)}")
    require("reference", CPU=config.num_cpus_per_worker, GPU=config.num_gpus_per_worker)
    if isinstance(inputs["images"], Source):
        facts = _published(config, inputs, out, progress)
    else:
        facts = _of_images(config, inputs, out, progress)
    return {**facts, "extractors": extractors.digests_of(inputs)}


def _of_images(
    config: ReferenceConfig, inputs: Mapping[str, Artifact | Source], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    images = inputs["images"]
    assert isinstance(images, Artifact)
    if not images.counts["lossless"]:
        progress.warn("the image shards are JPEG: distances to them differ from distances to the original images")
    total, size = images.counts["images"], images.counts["image_size"]
    device = device_kind(config.num_gpus_per_worker)
    earlier = earlier_features(out, STAGE.version, images, extractors.digests_of(inputs), device)
    try:
        made, computed_on = _extract_parts(config, inputs, images, out, progress, earlier)
    except WrongRowError as error:
        progress.warn(f"no features of an earlier reference are reused, all are computed: {message_of(error)}")
        numbers = range(len(images.entries(IMAGE_SHARDS)))
        discard_files(out, [_PARTS, *(IMAGE_FEATURES.format(number) for number in numbers)])
        (made, computed_on), earlier = _extract_parts(config, inputs, images, out, progress, {}), {}
    out.discard(_PARTS)
    reusing = {
        space: {number: item for number, item in enumerate(places) if item is not None and number in made}
        for space, places in earlier.items()
    }
    reused = features_record(reusing, out.fingerprint)
    facts = {"images": total, "image_size": size, "source": "images", "content": images.manifest.digest}
    return {**facts, DEVICE: computed_on, **({REUSED: reused} if reused else {})}


def _extract_parts(
    config: ReferenceConfig,
    inputs: Mapping[str, Artifact | Source],
    images: Artifact,
    out: ArtifactWriter,
    progress: Progress,
    earlier: Mapping[str, Sequence[Places | None]],
) -> tuple[set[int], str]:
    """Write the features of all shards and the reference of them.

    Returns the numbers of the shards made now, and the kind of device that computed them.
    """
    parts, total = parts_of(images), images.counts["images"]
    resources: dict[str, Any] = {"num_cpus": config.num_cpus_per_worker, "num_gpus": config.num_gpus_per_worker}
    arguments = (config, dict(inputs), parts, out, progress, earlier)
    results = dict(pooled(Extraction, config.num_workers, range(len(parts)), *arguments, **resources))
    if problems := [part.problem for part in results.values() if part.problem]:
        raise WrongRowError(problems[0])
    if (rows := sum(part.images for part in results.values())) != total:
        raise UserError(
            f"the image shards contain {rows} images, but their manifest states {total}; run preprocess again"
        )
    _merge(len(parts), out)
    made = {shard for part in results.values() for shard in part.shards}
    return made, kind_of_devices(part.device for part in results.values())


def _merge(parts: int, out: ArtifactWriter) -> None:
    """Join the parts in order, because sums of floats depend on it."""
    from safetensors.numpy import save

    from edt_core.evaluation.metrics import FeatureStatistics

    sums, features = Sums(), dict[str, list[NDArray[np.float32]]]()
    for number in range(parts):
        tensors = load_tensors(local_copy(out.data, _PART.format(number)), "numpy")
        for key in [name.removesuffix(".mean") for name in tensors if name.endswith(".mean")]:
            arrays = {name: tensors[f"{key}.{name}"] for name in ("count", "mean", "scatter")}
            sums.merge(key, FeatureStatistics.from_arrays(arrays))
        for name, value in tensors.items():
            if name.endswith(".features"):
                features.setdefault(name, []).append(value)
    joined = {name: np.concatenate(blocks) for name, blocks in features.items()}
    gaussians = {key: statistics.gaussian for key, statistics in sums.statistics.items()}
    out.write_bytes(REFERENCE_NAME, save({**_arrays(gaussians), **joined}), len(next(iter(joined.values()))))


def _arrays(gaussians: Mapping[str, Any]) -> Tensors:
    return {
        name: value
        for key, gaussian in gaussians.items()
        for name, value in (
            (f"{key}.mean", gaussian.mean),
            (f"{key}.covariance", gaussian.covariance),
            (f"{key}.count", np.array([gaussian.count or 0], dtype=np.int64)),  # 0 if unknown
        )
    }


def _published(
    config: ReferenceConfig, inputs: Mapping[str, Artifact | Source], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    import ray

    statistics, spaces = inputs["images"], extractors.spaces_of(inputs)
    assert isinstance(statistics, Source)
    if spaces != [INCEPTION]:
        raise UserError(
            f"{statistics.location} contains statistics of Inception features, but {', '.join(spaces)} is requested; "
            "pass only the Inception weights, or images instead of the statistics"
        )
    resources: dict[str, Any] = {"num_cpus": config.num_cpus_per_worker, "num_gpus": config.num_gpus_per_worker}
    task: Any = ray.remote(_extract_published).options(**resources)
    facts: dict[str, Any] = ray.get(task.remote(config, statistics, inputs[INCEPTION], out, progress))
    return {**facts, "source": "published statistics", "content": statistics.fingerprint}


def _extract_published(
    config: ReferenceConfig, statistics: Source, weights: Source, out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Store ADM's Gaussians unchanged, and the features of its images; return the counts of those images."""
    from safetensors.numpy import save

    from edt_core.evaluation.metrics.adm import read_adm, read_images
    from edt_core.precision import use_precision

    use_threads(config.num_cpus_per_worker)
    use_precision("fp32")
    path = Path(statistics.location)
    if sha256_file(path) != statistics.fingerprint:
        raise UserError(f"{path} has changed since the run was started; run again once nothing writes to the file")
    adm = read_adm(path)
    total = adm.image_shape[0] if adm.image_shape else 0
    device = device_name(config.num_gpus_per_worker)
    extract = extractors.load(INCEPTION, weights, device)
    features, done = [], 0
    for pixels in read_images(path, _ADM_CHUNK):
        rows = evenly_spaced(done, len(pixels), total, config.keep_features)
        if rows:
            features.append(extract(pixels[rows])["features"])
        done += len(pixels)
        progress.update(done, total, "images")
    gaussians = {INCEPTION: adm.statistics}
    if adm.spatial_statistics is not None:
        gaussians[f"{INCEPTION}.spatial"] = adm.spatial_statistics
    tensors = {f"{INCEPTION}.features": np.concatenate(features)} if features else {}
    out.write_bytes(REFERENCE_NAME, save({**_arrays(gaussians), **tensors}), done)
    size = adm.image_shape[1] if adm.image_shape else None
    return {"images": total, "image_size": size, DEVICE: kind_of_devices([device])}


def statistics_source(location: str) -> Source:
    """ADM's file of reference statistics, identified by its sha256. Raises UserError if it does not exist."""
    path = typed_path(location).absolute()
    if not path.is_file():
        raise UserError(
            f"there are no reference statistics at {location}; download VIRTUAL_imagenet256_labeled.npz as described "
            "at github.com/openai/guided-diffusion/tree/main/evaluations, or pass images instead"
        )
    return Source(str(path), sha256_file(path))


STAGE = Stage(
    "reference",
    "reference",
    2,
    ReferenceConfig,
    reference,
    roles=("images",),
    optional=EXTRACTORS,
)

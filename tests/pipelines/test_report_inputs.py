"""What a report reads out of artifacts: the right images, and no more files than it needs."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from edt_core.config import ReferenceConfig, SampleConfig
from edt_core.data.shards import ImageSample, write_image_shard
from edt_core.data.subsets import at_even_distances
from edt_core.diffusion.timesteps import LossSecondMomentSampler
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import CHECKPOINTS, FEATURE_UNIT, IMAGE_SHARD, REFERENCE_NAME, TIMESTEP_STATE
from pipelines.report import inputs as report_inputs
from pipelines.report.costs import step_cost
from pipelines.report.inputs import (
    PER_CLASS,
    find_neighbours,
    kept_rows,
    no_neighbours,
    read_samples,
    real_images,
    timestep_losses,
)

NUMBER = 60  # images, 20 a shard, sorted by class: 0, 1, 2
FEATURES = np.random.default_rng(0).normal(size=(NUMBER, 3)).astype(np.float32)


def committed(
    folder: Path, kind: str, files: Mapping[str, bytes], config: Mapping[str, Any], counts: Mapping[str, Any]
) -> Artifact:
    out = ArtifactWriter(Folder.at(folder), kind, "f" * 64)
    for name, data in files.items():
        out.write_bytes(name, data, counts.get("rows"))
    return out.commit(config, {}, counts)


def picture(number: int) -> np.ndarray:
    """Of one colour, by which it is known again."""
    return np.full((4, 4, 3), number, dtype=np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("images")
    out = ArtifactWriter(Folder.at(folder), "images", "f" * 64)
    for shard in range(3):
        samples = []
        for number in range(20 * shard, 20 * shard + 20):
            buffer = io.BytesIO()
            Image.fromarray(picture(number)).save(buffer, "PNG")
            samples.append(ImageSample(f"{number:03d}", buffer.getvalue(), shard, "", ""))
        out.write(IMAGE_SHARD.format(shard), lambda path, samples=samples: write_image_shard(path, samples, "png"))
    return out.commit({}, {}, {"images": NUMBER, "classes": 3})


def reference_of(folder: Path, images: Artifact, keep: int) -> Artifact:
    """The reference job's artifact of the images, with FEATURES for what an extractor sees in them."""
    rows = [row for row in range(NUMBER) if at_even_distances(row, NUMBER, keep)]
    counts = {"images": NUMBER, "source": "images", "content": images.manifest.digest, "extractors": {"dinov2": "d"}}
    files = {REFERENCE_NAME: save({"dinov2.features": FEATURES[rows]})}
    return committed(folder, "reference", files, ReferenceConfig(keep_features=keep).model_dump(mode="json"), counts)


def features_of(folder: Path, features: np.ndarray, unit_size: int = 8, keep_images: int = 12) -> Artifact:
    """The sample job's artifact: sample i is of class i mod 3, and its picture of colour 100 + i."""
    config = SampleConfig(num_samples=len(features), unit_size=unit_size, keep_images=keep_images)
    files = {}
    for unit, start in enumerate(range(0, len(features), unit_size)):
        indices = np.arange(start, min(start + unit_size, len(features)))
        tensors = {"indices": indices, "labels": indices % 3, "dinov2.features": features[indices]}
        kept = [picture(100 + i) for i in indices.tolist() if i < keep_images]
        files[FEATURE_UNIT.format(unit)] = save(tensors | ({"images": np.stack(kept)} if kept else {}))
    return committed(folder, "features", files, config.model_dump(mode="json"), {"extractors": {"dinov2": "d"}})


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the artifacts' files that are asked for."""
    names: list[str] = []
    path = Artifact.path

    def noted(self: Artifact, name: str) -> Path:
        names.append(name)
        return path(self, name)

    monkeypatch.setattr(Artifact, "path", noted)
    return names


@pytest.mark.parametrize(("total", "limit"), [(10, 3), (10, 10), (10, 99), (1797, 1000), (7, 1), (0, 5)])
def test_kept_rows_are_those_that_the_jobs_keep(total: int, limit: int) -> None:
    assert kept_rows(total, limit).tolist() == [k for k in range(total) if at_even_distances(k, total, limit)]


def test_samples_are_the_first_of_each_class_with_their_features(tmp_path: Path, opened: list[str]) -> None:
    made = np.arange(120, dtype=np.float32).reshape(40, 3)
    artifact = features_of(tmp_path / "some", made)
    found = read_samples(artifact, np.arange(3), "dinov2")
    assert found.labels.tolist() == [0, 1, 2] * 4
    assert found.images[:, 0, 0, 0].tolist() == list(range(100, 112))
    assert found.features is not None
    np.testing.assert_array_equal(found.features, made[:12])
    np.testing.assert_array_equal(found.measured, made)
    opened.clear()
    np.testing.assert_array_equal(read_samples(artifact, np.arange(3)).images, found.images)
    assert opened == [FEATURE_UNIT.format(k) for k in range(3)]  # the third has no pixels any more
    every = read_samples(features_of(tmp_path / "all", made, keep_images=40), np.arange(3), "dinov2")
    assert np.bincount(every.labels).tolist() == [PER_CLASS] * 3
    assert every.features is not None
    np.testing.assert_array_equal(every.features[:, 0] / 3 + 100, every.images[:, 0, 0, 0])
    opened.clear()
    read_samples(features_of(tmp_path / "many", made, keep_images=40), np.arange(2))
    assert opened == [FEATURE_UNIT.format(k) for k in range(3)]  # by then there are eight of both classes


def test_real_images_are_read_no_further_than_needed(images: Artifact, opened: list[str]) -> None:
    pixels, labels = real_images(images, [20, 5, 0])  # class 2 has none: the third shard is not needed
    assert opened == [IMAGE_SHARD.format(0), IMAGE_SHARD.format(1)]
    assert labels.tolist() == [0] * PER_CLASS + [1] * 5
    assert pixels[:, 0, 0, 0].tolist() == [*range(PER_CLASS), *range(20, 25)]
    assert real_images(images)[1].tolist() == [label for label in range(3) for _ in range(PER_CLASS)]


@pytest.mark.parametrize("block", [4, 4096])
@pytest.mark.parametrize(("keep", "searched"), [(10_000, 50_000), (25, 50_000), (50, 15)])
def test_neighbours_are_those_of_a_search_through_all_that_is_kept(
    images: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, searched: int, block: int
) -> None:
    monkeypatch.setattr(report_inputs, "_BLOCK", block)
    monkeypatch.setattr(report_inputs, "_MOST_REAL", searched)
    monkeypatch.setattr(report_inputs, "_MOST_MEASURED", 20)
    made = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    made[1] = FEATURES[kept_rows(NUMBER, keep)[0]] if searched > NUMBER else made[1]  # a copy
    samples = read_samples(features_of(tmp_path / "features", made), np.arange(3), "dinov2")
    reference = reference_of(tmp_path / "reference", images, keep)
    found = find_neighbours("dinov2", samples, reference, images)

    there = kept_rows(NUMBER, keep)[kept_rows(min(keep, NUMBER), searched)]  # numbers of the images that are searched
    distances = np.linalg.norm(made[:, None].astype(np.float64) - FEATURES[there][None], axis=2)
    shown = [0, 3, 1, 4, 2, 5]  # two of each class
    order = distances[shown].argsort(axis=1)[:, :3]
    np.testing.assert_array_equal(found.samples[:, 0, 0, 0], np.array(shown) + 100)
    np.testing.assert_array_equal(found.real[:, :, 0, 0, 0], there[order])
    np.testing.assert_array_equal(found.real_labels, there[order] // 20)
    np.testing.assert_allclose(found.distances, np.take_along_axis(distances[shown], order, 1), atol=1e-6)
    np.testing.assert_allclose(found.generated_nearest, distances[:20].min(axis=1), atol=1e-6)
    among = np.linalg.norm(FEATURES[there][:, None].astype(np.float64) - FEATURES[there][None], axis=2)
    np.fill_diagonal(among, np.inf)
    np.testing.assert_allclose(found.real_nearest, among.min(axis=1)[kept_rows(len(there), 20)], atol=1e-6)
    assert (found.searched, found.total) == (len(there), NUMBER)
    if searched > NUMBER:
        assert found.distances[2, 0] == 0


def test_where_there_are_no_neighbours_it_is_said_why(images: Artifact, tmp_path: Path) -> None:
    features = features_of(tmp_path / "features", FEATURES)
    samples, reference = (
        read_samples(features, np.arange(3), "dinov2"),
        reference_of(tmp_path / "reference", images, 30),
    )
    assert no_neighbours("dinov2", samples, features, reference, images) == ""
    assert "different networks" in no_neighbours("inception", samples, features, reference, images)
    counts = {**reference.counts, "source": "published statistics"}
    config = reference.manifest.config
    published = committed(tmp_path / "published", "reference", {REFERENCE_NAME: b""}, config, counts)
    assert "published statistics" in no_neighbours("dinov2", samples, features, published, images)


def test_losses_by_timestep_are_means_of_what_the_sampler_remembers(tmp_path: Path) -> None:
    sampler = LossSecondMomentSampler(4, history=3)
    sampler.update([0, 1, 1, 2, 2, 2, 2], [5.0, 1.0, 2.0, 9.0, 1.0, 2.0, 3.0])  # the ring forgets the 9

    def losses(name: str, state: Mapping[str, np.ndarray]) -> np.ndarray | None:
        files = {f"{CHECKPOINTS}/step-00000008/{TIMESTEP_STATE}": save(dict(state))}
        counts = {"final": "merged", "checkpoints": ["step-00000004", "step-00000008"]}
        return timestep_losses(committed(tmp_path / name, "checkpoint", files, {}, counts))

    np.testing.assert_array_equal(losses("trained", sampler.state_dict()), [5.0, 1.5, 2.0, np.nan])
    assert losses("untrained", LossSecondMomentSampler(4).state_dict()) is None
    assert losses("uniform", {}) is None


def test_the_operations_of_sampling_are_those_of_its_passes(tmp_path: Path) -> None:
    def flops(name: str, guide: str | None = None, guide_macs: int | None = None, **chain: Any) -> int | None:
        config = SampleConfig(num_samples=10, num_sampling_steps=25, **chain).model_dump(mode="json")
        counts = {"samples": 10, "guide_digest": guide, **({} if guide_macs is None else {"guide_macs": guide_macs})}
        return step_cost("sample", committed(tmp_path / name, "features", {"f": b"f"}, config, counts), 7).flops

    assert flops("plain") == 2 * 7 * 25 * 10
    assert flops("guided", cfg_scale=1.5) == 2 * 2 * 7 * 25 * 10
    assert flops("interval", cfg_scale=1.5, guidance_interval=(0, 500)) is None
    assert flops("by a guide that was not counted", "d" * 64, cfg_scale=1.5) is None
    assert flops("by a guide", "d" * 64, 3, cfg_scale=1.5) == 2 * (7 + 3) * 25 * 10


def test_throughput_is_the_work_over_the_time(tmp_path: Path) -> None:
    out = ArtifactWriter(Folder.at(tmp_path), "checkpoint", "f" * 64)
    out.write_bytes("a", b"12345")
    counts = {"images_seen": 600, "training_flops": 9_000, "device_hours": 0.5}
    import time

    cost = step_cost("train", out.commit({}, {}, counts, started=time.time() - 30), 7)
    assert cost.rate == pytest.approx(600 / cost.seconds)
    assert (cost.work, cost.unit, cost.flops, cost.device_seconds, cost.bytes) == (600, "images", 9_000, 1800, 5)
    untrained = {"images_seen": 0, "training_flops": 0, "device_hours": 0.0}
    nothing = step_cost("train", committed(tmp_path / "untrained", "checkpoint", {"a": b"a"}, {}, untrained), 7)
    assert (nothing.work, nothing.rate, nothing.flops, nothing.device_seconds) == (None, None, None, None)

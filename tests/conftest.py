"""Fixtures that several packages' tests share: one Ray session, one image folder, the sample photos."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edt_core.artifact import Artifact, ArtifactWriter, Source
from edt_core.environment import quiet_defaults
from edt_core.progress import Silent
from edt_core.storage import Folder

quiet_defaults()

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray session for all tests: starting it costs seconds."""
    import ray

    from jobs.cluster import connect

    connect(min_cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def photos() -> Path:
    """250 full-size ImageNet photos, one a class; not part of the project."""
    folder = SHARED_DATA / "imagenet_sample"
    if not folder.is_dir():
        pytest.skip(f"the sample photos are not here ({folder})")
    return folder


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight real digits of each of four classes, as an image folder."""
    from edt_core.data.digits import write_digits

    whole = write_digits(tmp_path_factory.mktemp("source") / "digits")
    folder = tmp_path_factory.mktemp("small") / "digits"
    for label in "0123":
        (folder / label).mkdir(parents=True)
        for path in sorted((whole / label).iterdir())[:8]:
            (folder / label / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def silent() -> Silent:
    return Silent()


@pytest.fixture(scope="session")
def latents_artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """96 made-up latents 4x8x8 of 4 classes in two shards, committed as an artifact."""
    from edt_core.data.latents import LatentInfo, LatentRows, write_latent_shard

    out = ArtifactWriter(Folder.at(tmp_path_factory.mktemp("latents")), "latents", "f" * 64)
    info = LatentInfo("test", 0.5, 32, (4, 8, 8))
    rng = np.random.default_rng(0)
    for k, rows in enumerate((40, 56)):
        labels = rng.integers(0, 4, rows)
        mean = rng.normal(size=(rows, 1, 4, 8, 8)) + labels[:, None, None, None, None]
        posterior = np.concatenate([mean, np.full_like(mean, 0.1), mean[..., ::-1], np.full_like(mean, 0.1)], axis=1)
        values = LatentRows(tuple(f"{k}-{i}" for i in range(rows)), labels, posterior.astype(np.float32))
        out.write(f"latents-{k:05d}.arrow", lambda path, values=values: write_latent_shard(path, values, info))
    counts = {"images": 96, "classes": 4, "image_size": 32, "latent_shape": [4, 8, 8], "scaling_factor": 0.5}
    counts["autoencoder_digest"] = "0" * 64
    return out.commit({}, {}, counts)


@pytest.fixture
def source(digits_folder: Path) -> Source:
    from edt_core.data.images import scan_image_folder, source_digest

    return Source(digits_folder, source_digest(scan_image_folder(digits_folder)))

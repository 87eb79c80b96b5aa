"""ADM's reference batches: what is read of them, and what is refused."""

import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edt_core.errors import UserError
from edt_core.evaluation.metrics import FeatureSet, adm, compute_metrics, count_images, read_adm, read_images


def a_covariance(size: int, seed: int = 0) -> NDArray[np.float64]:
    values = np.random.default_rng(seed).standard_normal((size + 5, size))
    return np.cov(values, rowvar=False)


IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
SMALL: dict[str, Any] = {
    "mu": np.arange(8.0),
    "sigma": a_covariance(8),
    "mu_s": np.arange(6.0),
    "sigma_s": a_covariance(6),
    "arr_0": IMAGES,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 8 and 6 dimensions in place of 2048 and 2023."""
    monkeypatch.setattr(adm, "POOL_DIMENSIONS", 8)
    monkeypatch.setattr(adm, "SPATIAL_DIMENSIONS", 6)


def saved(folder: Path, arrays: dict[str, Any]) -> Path:
    np.savez(folder / "batch.npz", **{name: value for name, value in arrays.items() if value is not None})
    return folder / "batch.npz"


def test_a_batch_of_inception_is_read(tmp_path: Path) -> None:
    arrays = {"mu": np.full(2048, 0.5), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    reference = read_adm(saved(tmp_path, arrays))
    assert reference.statistics.mean.tolist() == [0.5] * 2048
    assert np.array_equal(reference.statistics.covariance, np.eye(2048))
    assert reference.statistics.count is None
    assert reference.spatial_statistics is not None
    assert reference.spatial_statistics.covariance.shape == (2023, 2023)
    assert reference.image_shape is None


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ">f8"])
def test_statistics_and_images_of_any_layout_are_read(tmp_path: Path, dtype: Any) -> None:
    path = saved(tmp_path, {**SMALL, "sigma": np.asfortranarray(SMALL["sigma"].astype(dtype))})
    reference = read_adm(path)
    np.testing.assert_allclose(reference.statistics.covariance, SMALL["sigma"], rtol=1e-6)
    assert reference.statistics.covariance.dtype == np.float64
    assert reference.image_shape == IMAGES.shape
    assert count_images(path) == 10
    chunks = list(read_images(path, chunk_size=4))
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    assert np.array_equal(np.concatenate(chunks), IMAGES)


@pytest.mark.usefixtures("small")
def test_the_reference_side_is_made_of_a_batch(tmp_path: Path) -> None:
    reference = read_adm(saved(tmp_path, SMALL))
    features = np.random.default_rng(3).standard_normal((30, 8))
    side = FeatureSet(statistics=reference.statistics, spatial_statistics=reference.spatial_statistics)
    assert list(compute_metrics(features, side)) == ["fid"]
    assert list(compute_metrics(FeatureSet(features, spatial=features[:, :6]), side)) == ["fid", "sfid"]


@pytest.mark.usefixtures("small")
def test_a_batch_may_lack_spatial_statistics_and_images(tmp_path: Path) -> None:
    path = saved(tmp_path, {"mu": SMALL["mu"], "sigma": SMALL["sigma"]})
    assert read_adm(path).spatial_statistics is None
    assert count_images(path) == 0
    assert list(read_images(path)) == []


@pytest.mark.parametrize("compressed", [False, True])
def test_images_are_read_in_bounded_memory(tmp_path: Path, compressed: bool) -> None:
    images = np.zeros((1500, 32, 32, 3), np.uint8)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "batch.npz", arr_0=images)
    tracemalloc.start()
    number = sum(len(chunk) for chunk in read_images(tmp_path / "batch.npz", chunk_size=16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == 1500
    assert peak < images.nbytes / 4


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "network: mu has 5 dimensions, but that of Inception has 8"),
        ({"sigma": np.eye(5)}, "another feature network: sigma has 5 dimensions"),
        ({"sigma_s": np.eye(9)}, "sigma_s has 9 dimensions, but that of Inception has 6"),
        ({"sigma": np.ones((8, 6))}, r"sigma is float64 of shape \(8, 6\)"),
        ({"mu": np.zeros((8, 1))}, r"mu is float64 of shape \(8, 1\)"),
        ({"mu": np.zeros(8, np.int64)}, "mu is int64"),
        ({"sigma": np.triu(np.ones((8, 8)))}, "mu and sigma: .* not symmetric"),
        ({"mu_s": np.full(6, np.inf)}, "mu_s and sigma_s: 6 values .* NaN or infinity"),
        ({"mu": np.array([None] * 8)}, "mu contains pickled Python objects"),
        ({"mu": None}, r"lacks \['mu'\]; it contains"),
        ({"mu_s": None}, "has only sigma_s"),
        ({"arr_0": IMAGES.astype(np.float32)}, "arr_0 is float32"),
        ({"arr_0": IMAGES[..., 0]}, r"arr_0 is uint8 of shape \(10, 4, 4\)"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = saved(tmp_path, {**SMALL, **change})
    with pytest.raises(UserError, match=message):
        read_adm(path)


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_adm(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("not found")
    np.save(tmp_path / "one.npy", np.zeros(8))
    for name in ("text.npz", "one.npy"):
        with pytest.raises(UserError, match="is not an npz, or is damaged"):
            read_adm(tmp_path / name)


@pytest.mark.usefixtures("small")
def test_a_damaged_batch_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, SMALL)
    whole = path.read_bytes()
    for part in (IMAGES.tobytes(), SMALL["sigma"].tobytes()):
        at = whole.index(part) + len(part) - 1
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match="damaged"):
            read_adm(path), list(read_images(path))
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="damaged"):
        read_adm(path)


@pytest.mark.parametrize(("rows", "message"), [(99, "arr_0 ends after 480 of 4,752 bytes"), (9, "has more bytes")])
def test_a_header_that_states_another_size_is_refused(tmp_path: Path, rows: int, message: str) -> None:
    np.save(tmp_path / "images.npy", IMAGES)
    member = (tmp_path / "images.npy").read_bytes().replace(b"(10, 4, 4, 3)", f"({rows:2}, 4, 4, 3)".encode())
    with zipfile.ZipFile(tmp_path / "batch.npz", "w") as archive:
        archive.writestr("arr_0.npy", member)
    with pytest.raises(UserError, match=message):
        list(read_images(tmp_path / "batch.npz"))

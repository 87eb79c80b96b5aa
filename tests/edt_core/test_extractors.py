"""Where published weights come from, what is refused, and the extractors of DINOv2 and of the fitted classifier."""

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from edt_core.errors import UserError
from edt_core.evaluation.extractors import PUBLISHED_SPACES, TOKEN_SPACES, extractor_spec, load_extractor
from edt_core.evaluation.extractors.classifier import Classifier, classify
from edt_core.evaluation.extractors.dinov2 import Dinov2, PatchTokens, resized_positions, to_dinov2_range
from edt_core.evaluation.extractors.pixels import check_pixels, exact_fp32
from edt_core.evaluation.extractors.weights import load_tensors, published_weights
from edt_core.store.manifest import sha256_json
from tests.support.models import clip_folder as made_clip
from tests.support.models import dinov2_folder as made_dinov2
from tests.support.servers import QuietHandler, listening

ROOT = Path(__file__).resolve().parents[2]
DATA = b"weights" * 1000
DIGEST = hashlib.sha256(DATA).hexdigest()
OTHER = "0" * 64
EXTRACTORS = ["dinov2", "clip", "classifier"]


class Touch:
    """A pickle of this makes a file when it is loaded as a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def random_pixels(side: int = 32, count: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class FileHandler(QuietHandler, SimpleHTTPRequestHandler):
    """Serves the files of a folder."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a web server, and the folder that it serves."""
    folder = tmp_path / "web"
    folder.mkdir()
    with listening(partial(FileHandler, directory=str(folder))) as address:
        yield address, folder


def kept(cache: Path) -> list[Path]:
    return [path for path in (cache / "weights").rglob("*") if path.is_file()]


# Weights by path, URL and hub id.


def test_a_file_is_named_by_the_digest_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(DATA)
    for location in (str(path), f"file://{path}"):
        assert published_weights("inception", location) == (str(path), DIGEST)
    assert published_weights("inception", str(path), DIGEST) == (str(path), DIGEST)
    with pytest.raises(UserError, match=f"has sha256 {DIGEST[:12]}, but inception.sha256 is {OTHER[:12]}"):
        published_weights("inception", str(path), OTHER)
    with pytest.raises(UserError, match="a sha256 is 64 digits"):
        published_weights("inception", str(path), "../evil")


@pytest.mark.parametrize("location", [None, "", "/nowhere/w.pth", "inception/w.pth"])
def test_missing_inception_says_what_where_and_how(location: str | None) -> None:
    with pytest.raises(UserError) as caught:
        published_weights("inception", location)
    for part in (
        "pt_inception-2015-12-05-6726825d.pth",
        "github.com/mseitzer/pytorch-fid/releases",
        "github.com/toshas/torch-fidelity/releases",
        "inception.weights",
        "--inception-weights",
        *([location] if location else []),
    ):
        assert part in str(caught.value)


def test_missing_dinov2_says_what_where_and_how() -> None:
    for location in (None, "/nowhere/dinov2"):
        with pytest.raises(UserError, match=r"facebook/dinov2-large .*facebookresearch/dinov2.*--dinov2-weights"):
            published_weights("dinov2", location)


def test_a_hub_id_stands_for_itself(tmp_path: Path) -> None:
    assert published_weights("dinov2", "facebook/dinov2-large") == (
        "facebook/dinov2-large",
        "hub:facebook/dinov2-large",
    )
    with pytest.raises(UserError, match="cannot be checked for the hub id"):
        published_weights("dinov2", "facebook/dinov2-large", OTHER)


def test_a_folder_is_named_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    files = {"config.json": b"{}", "sub/model.safetensors": b"tensors"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    digest = sha256_json({name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
    assert published_weights("dinov2", str(tmp_path)) == (str(tmp_path), digest)
    (tmp_path / "sub/model.safetensors").write_bytes(b"others")
    with pytest.raises(UserError, match=f"dinov2.sha256 is {digest[:12]}"):
        published_weights("dinov2", str(tmp_path), digest)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        published_weights("dinov2", str(tmp_path))


def test_a_folder_for_a_file_and_a_file_for_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").touch()
    with pytest.raises(UserError, match="which is a folder, not a file"):
        published_weights("inception", str(tmp_path))
    with pytest.raises(UserError, match="which is a file, not a folder"):
        published_weights("dinov2", str(tmp_path / "w.pth"))
    with pytest.raises(UserError, match="one file; a DINOv2 is a folder"):
        published_weights("dinov2", "https://example.org/model.safetensors", OTHER)


def test_a_url_is_downloaded_once_and_checked_each_time(web: tuple[str, Path], cache: Path) -> None:
    address, folder = web
    (folder / "w.pth").write_bytes(DATA)
    path, digest = published_weights("inception", f"{address}/w.pth?token=secret", DIGEST)
    assert (Path(path), digest) == (cache / "weights" / DIGEST / "w.pth", DIGEST)
    assert Path(path).read_bytes() == DATA
    (folder / "w.pth").unlink()
    assert published_weights("inception", f"{address}/w.pth", DIGEST) == (path, DIGEST)
    Path(path).write_bytes(DATA[:-1])  # damaged where it is kept: not used, but taken anew
    with pytest.raises(UserError, match="404"):
        published_weights("inception", f"{address}/w.pth", DIGEST)
    (folder / "w.pth").write_bytes(DATA)
    assert published_weights("inception", f"{address}/w.pth", DIGEST) == (path, DIGEST)
    assert Path(path).read_bytes() == DATA


def test_other_bytes_than_stated_are_refused_and_not_kept(web: tuple[str, Path], cache: Path) -> None:
    address, folder = web
    (folder / "w.pth").write_bytes(DATA)
    with pytest.raises(UserError, match=rf"\(7000 bytes\) has sha256 {DIGEST[:12]}.*is {OTHER[:12]}") as caught:
        published_weights("inception", f"{address}/w.pth?token=secret", OTHER)
    assert "secret" not in str(caught.value)
    assert kept(cache) == []


def test_a_url_needs_a_digest(cache: Path) -> None:
    with pytest.raises(UserError, match=r"without inception\.sha256.*can change"):
        published_weights("inception", "https://example.org/w.pth?token=secret")
    assert not cache.exists()


def test_a_server_that_is_not_there_is_one_clear_message(cache: Path, web: tuple[str, Path]) -> None:
    with listening(QuietHandler) as address:
        closed = f"{address}/w.pth"
    for url in (closed, f"{web[0]}/w.pth", "memory://nowhere/w.pth"):
        with pytest.raises(UserError, match=f"cannot download {url}: .*use its path"):
            published_weights("inception", url, DIGEST)
    assert kept(cache) == []


def test_an_object_store_serves_as_well(cache: Path, tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}/w.pth"
    with fsspec.open(url, "wb") as file:
        file.write(DATA)
    path, digest = published_weights("inception", url, DIGEST)
    assert Path(path).read_bytes() == DATA
    assert digest == DIGEST


# Files that hold more, or less, than tensors.


@pytest.mark.parametrize("form", ["torch", "bare pickle"])
def test_pickled_code_is_neither_run_nor_loaded(tmp_path: Path, form: str) -> None:
    ran, path = tmp_path / "ran", tmp_path / "w.pth"
    payload = {"fc.weight": Touch(ran)}
    if form == "torch":
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload, protocol=2))
    with pytest.raises(
        UserError, match="contains pickled code or is not a file of tensors; it is not loaded"
    ) as caught:
        load_extractor("inception", path)
    assert not ran.exists()
    assert "weights_only" not in str(caught.value)
    if form == "bare pickle":  # the trap is a real one
        pickle.loads(path.read_bytes())
        assert ran.exists()


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_weights_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(data)
    with pytest.raises(UserError, match="is not a file of tensors"):
        load_tensors(path, "the published file")


def test_tensors_without_names_and_no_file_at_all_are_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "w.pth")
    with pytest.raises(UserError, match="contains a list, not tensors by name"):
        load_tensors(tmp_path / "w.pth", "the published file")
    with pytest.raises(UserError, match=r"the file .* does not exist.*--inception-weights"):
        load_extractor("inception", tmp_path / "none.pth")


# What every extractor takes.


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 8, 8, 3), np.float32, r"float32 \[2, 8, 8, 3\].*levels 0..255"),
        ((2, 8, 8, 3), np.int64, r"int64 .*levels 0..255"),
        ((2, 8, 8, 4), np.uint8, "last axis is 4, not the 3 of RGB; convert to RGB"),
        ((2, 3, 8, 8), np.uint8, "the channels come last, permute them"),
        ((2, 8, 9, 3), np.uint8, "8 x 9 pixels are not square"),
        ((8, 8, 3), np.uint8, "a batch has four axes"),
        ((0, 8, 8, 3), np.uint8, "leave empty batches out"),
    ],
)
def test_other_pixels_are_refused(shape: tuple[int, ...], dtype: type, message: str) -> None:
    array = np.zeros(shape, dtype)
    for pixels in (array, torch.from_numpy(array)):
        with pytest.raises(UserError, match=message):
            check_pixels(pixels)


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2 with random weights and positions of 37 x 37 patches, as the published ones have."""
    pytest.importorskip("transformers", reason="transformers, the extra [dinov2], is not installed")
    return made_dinov2(tmp_path_factory.mktemp("dinov2"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="transformers, the extra [clip], is not installed")
    return made_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Classifier(num_classes=5, base_channels=4, feature_dim=6).save(folder)
    return folder


@pytest.mark.parametrize("space", EXTRACTORS)
def test_outputs_hang_on_the_images_alone(space: str, request: pytest.FixtureRequest) -> None:
    """Not on the container, the order in memory, who shares the batch, or the precision that is on outside."""
    extractor = load_extractor(space, request.getfixturevalue(f"{space}_folder"))
    assert extractor.space == space
    pixels = random_pixels()
    expected = extractor(pixels)
    assert all(values.dtype == np.float32 and len(values) == 3 for values in expected.values())
    assert len({values.tobytes() for values in expected["features"]}) == 3
    frozen = pixels.copy()
    frozen.flags.writeable = False
    for same in (frozen, np.flip(np.flip(pixels, 2).copy(), 2), torch.from_numpy(pixels)):
        for name, values in extractor(same).items():
            np.testing.assert_array_equal(values, expected[name])
    with torch.autocast("cpu", torch.bfloat16):
        for name, values in extractor(pixels).items():
            np.testing.assert_array_equal(values, expected[name])
    for name, values in extractor(pixels[1:2]).items():
        np.testing.assert_allclose(values, expected[name][1:2], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="a feature network needs uint8"):
        extractor(pixels.astype(np.float32))  # type: ignore[arg-type]


def test_precision_comes_back_after_an_error() -> None:
    backends: list[Any] = [torch.backends.cudnn.conv, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]

    def fail() -> None:
        with exact_fp32(torch.device("cpu")):
            raise RuntimeError(*{backend.fp32_precision for backend in backends})

    with pytest.raises(RuntimeError, match=r"^ieee$"):
        fail()
    assert [backend.fp32_precision for backend in backends] == before


# DINOv2.


def test_dinov2_is_the_class_token_of_the_authors_network(dinov2_folder: Path) -> None:
    """Against transformers' own model with the position embeddings resized by the authors' rule."""
    from transformers import Dinov2Model

    pixels = random_pixels(side=40)
    found = load_extractor("dinov2", dinov2_folder)(pixels)
    assert set(found) == {"features"}
    model = Dinov2Model.from_pretrained(dinov2_folder).eval()
    images = to_dinov2_range(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    with torch.inference_mode():
        plain = model(pixel_values=images).last_hidden_state[:, 0].numpy()
        model.embeddings.position_embeddings = torch.nn.Parameter(
            resized_positions(model.embeddings.position_embeddings, 16)
        )
        expected = model(pixel_values=images).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(found["features"], expected, rtol=1e-5, atol=1e-5)
    assert abs(plain - expected).max() > 1e-3  # transformers' own resize is another


def test_tokens_of_patches_are_those_of_repa(dinov2_folder: Path) -> None:
    """Its steps, one by one: levels in 0..1, standardised, resized without antialiasing; positions with it."""
    from transformers import Dinov2Model

    pixels = random_pixels(side=256)
    found = PatchTokens.load(dinov2_folder)(pixels)["tokens"]
    model = Dinov2Model.from_pretrained(dinov2_folder).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = ((torch.from_numpy(pixels) / 255.0 - mean) / std).permute(0, 3, 1, 2)
    images = torch.nn.functional.interpolate(images, 224, mode="bicubic")
    positions = model.embeddings.position_embeddings.detach()
    grid = positions[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, (16, 16), mode="bicubic", antialias=True)
    resized = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    with torch.inference_mode():
        model.embeddings.position_embeddings = torch.nn.Parameter(resized)
        expected = model(pixel_values=images).last_hidden_state[:, 1:].numpy()
    assert found.shape == (3, 256, 32)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    of_class = load_extractor("dinov2", dinov2_folder)
    assert set(of_class(pixels)) == {"features"}
    assert extractor_spec("dinov2").load_tokens is not None
    assert [space for space in PUBLISHED_SPACES if extractor_spec(space).load_tokens] == list(TOKEN_SPACES)


def test_positions_are_scaled_by_a_tenth_more() -> None:
    """Along a line of embeddings, position k of the small grid is at (k + 1/2) x 37 / 16.1 - 1/2 of the large one."""
    line = torch.arange(37.0).view(1, 37, 1).expand(37, 37, 1).reshape(1, 37 * 37, 1)
    resized = resized_positions(torch.cat([torch.full((1, 1, 1), 7.0), line], dim=1), 16)
    assert resized.shape == (1, 257, 1)
    assert float(resized[0, 0, 0]) == 7.0
    expected = (torch.arange(16.0) + 0.5) * 37 / 16.1 - 0.5
    # Bicubic interpolation gives a line back within 0.05, away from its ends; without the tenth it were 0.2 off.
    torch.testing.assert_close(resized[0, 1:, 0].view(16, 16)[5, 1:-1], expected[1:-1], rtol=0, atol=0.06)
    assert resized_positions(resized, 16) is resized


def test_dinov2_sees_imagenets_mean_as_zero() -> None:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) * 255
    grey = to_dinov2_range(mean.expand(1, 3, 50, 50))
    assert grey.shape == (1, 3, 224, 224)
    torch.testing.assert_close(grey, torch.zeros_like(grey), rtol=0, atol=1e-4)
    white = to_dinov2_range(torch.full((1, 3, 224, 224), 255, dtype=torch.uint8))
    assert white[0, :, 0, 0].tolist() == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])


def test_dinov2_shrinks_without_aliasing() -> None:
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(448).expand(1, 3, 896, 896)
    assert float(to_dinov2_range(stripes)[..., 10:-10].std(dim=(2, 3)).max()) < 0.05


def changed(folder: Path, tmp_path: Path, **config: Any) -> Path:
    """A copy of a model's folder with other entries in its configuration."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((folder / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def test_another_network_is_no_dinov2(dinov2_folder: Path, tmp_path: Path) -> None:
    for number, (config, message) in enumerate(
        [
            ({"model_type": "dinov2_with_registers"}, "it is a dinov2_with_registers"),
            ({"num_hidden_layers": 3}, r"tensors are missing or have another shape, encoder\.layer\.2\."),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UserError, match=f"no DINOv2 at .*{message}.*facebook/dinov2-large"):
            Dinov2.load(changed(dinov2_folder, folder, **config))


def test_damaged_missing_and_pickled_dinov2_are_refused(dinov2_folder: Path, tmp_path: Path) -> None:
    folder = changed(dinov2_folder, tmp_path)
    weights, ran = folder / "model.safetensors", tmp_path / "ran"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"no DINOv2 at .*--dinov2-weights"):
        Dinov2.load(folder)
    weights.unlink()
    torch.save({"layernorm.weight": Touch(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no DINOv2 at .*--dinov2-weights"):
        Dinov2.load(folder)
    assert not ran.exists()


def test_a_hub_out_of_reach_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers, the extra [dinov2], is not installed")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no DINOv2 at nobody/has-this: .*facebookresearch/dinov2.*--dinov2-weights"):
        load_extractor("dinov2", "nobody/has-this")


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install edt-pipeline\[dinov2\]"):
        load_extractor("dinov2", "facebook/dinov2-large")


# The classifier, and the package.


def test_the_classifier_is_classify(classifier_folder: Path) -> None:
    pixels = random_pixels(side=16)
    found = load_extractor("classifier", classifier_folder)(pixels)
    features, probabilities = classify(Classifier.load(classifier_folder), pixels)
    assert set(found) == {"features", "probabilities"}
    np.testing.assert_array_equal(found["features"], features)
    np.testing.assert_array_equal(found["probabilities"], probabilities)
    np.testing.assert_allclose(found["probabilities"].sum(1), 1, rtol=1e-6)


def test_what_is_no_classifier_is_refused(classifier_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no classifier at .*use the folder"):
        load_extractor("classifier", tmp_path / "none")
    for path in classifier_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="no classifier at"):
        load_extractor("classifier", tmp_path)


def test_an_unknown_space_is_refused() -> None:
    with pytest.raises(UserError, match="unknown feature space 'pixels'; known: classifier, inception, dinov2, clip"):
        load_extractor("pixels", "anywhere")


@pytest.mark.extern
def test_the_package_imports_with_torch_and_numpy_alone() -> None:
    absent = ["pydantic", "transformers", "safetensors", "fsspec", "filelock", "pyarrow", "PIL", "diffusers", "ray"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "from edt_core.evaluation.extractors import clip, inception, dinov2\n"
        "import edt_core.evaluation.extractors.weights"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr

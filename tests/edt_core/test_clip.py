"""CLIP's image encoder as a network of features: what it sees, what it gives, and the folders that it refuses."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from edt_core.errors import UserError
from edt_core.evaluation.extractors import extractor_spec, load_extractor
from edt_core.evaluation.extractors.clip import Clip, ClipInput, pillow_bicubic
from edt_core.evaluation.extractors.weights import feature_dimensions, published_weights
from tests.support.models import clip_folder

pytest.importorskip("transformers", reason="transformers, the extra [clip], is not installed")

OTHERS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def smooth_images(side: int, number: int = 3) -> NDArray[np.uint8]:
    """Images with edges and noise, uint8 [N, side, side, 3]."""
    rng = np.random.default_rng(side)
    blocks = [Image.fromarray(block) for block in rng.integers(0, 256, (number, 9, 9, 3), dtype=np.uint8)]
    images = np.stack([np.asarray(block.resize((side, side), Image.Resampling.BICUBIC)) for block in blocks])
    return (images.astype(int) + rng.integers(-20, 21, images.shape)).clip(0, 255).astype(np.uint8)


def by_pillow(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    resized = [Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image) for image in resized])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip") / "vision")


@pytest.mark.parametrize("side", [24, 32, 64, 256, 400])
@pytest.mark.parametrize("target", [40, 336])
def test_images_are_resized_as_pillow_does(side: int, target: int) -> None:
    images = smooth_images(side)
    found = pillow_bicubic(torch.from_numpy(images).permute(0, 3, 1, 2), target).permute(0, 2, 3, 1).numpy()
    expected = by_pillow(images, target).astype(np.float32)
    assert np.abs(found - expected).max() <= 1
    assert (found != expected).mean() < 1e-3
    np.testing.assert_array_equal(found, found.round())


def test_an_image_of_the_right_size_stays_as_it_is() -> None:
    images = torch.from_numpy(smooth_images(40)).permute(0, 3, 1, 2)
    np.testing.assert_array_equal(pillow_bicubic(images, 40).numpy(), images.numpy())


@pytest.mark.parametrize("settings", [{}, OTHERS])
def test_features_are_embeddings_of_length_1(settings: dict[str, list[float]], tmp_path: Path) -> None:
    """The authors' steps: Pillow, 0..1, mean and std, projected embedding, divided by its length."""
    from transformers import CLIPVisionModelWithProjection

    place = clip_folder(tmp_path / "clip", **settings)
    pixels = smooth_images(64)
    found = load_extractor("clip", place)(pixels)
    assert set(found) == {"features"}
    assert found["features"].dtype == np.float32
    mean = settings.get("image_mean", [0.48145466, 0.4578275, 0.40821073])
    std = settings.get("image_std", [0.26862954, 0.26130258, 0.27577711])
    images = (by_pillow(pixels, 40) / 255 - np.array(mean)) / np.array(std)
    model = CLIPVisionModelWithProjection.from_pretrained(place).eval()
    with torch.inference_mode():
        plain = model(pixel_values=torch.from_numpy(images).float().permute(0, 3, 1, 2)).image_embeds.numpy()
    expected = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    assert np.abs(np.linalg.norm(plain, axis=1) - 1).min() > 0.1
    np.testing.assert_allclose(np.linalg.norm(found["features"], axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found["features"], expected, atol=1e-4)  # a level in a thousand is another
    exact = load_extractor("clip", place)(by_pillow(pixels, 40))["features"]
    np.testing.assert_allclose(exact, expected, atol=2e-6)


def test_a_whole_clip_gives_its_image_encoder(folder: Path, tmp_path: Path) -> None:
    pixels = smooth_images(40)
    whole = clip_folder(tmp_path / "whole", whole=True)
    assert json.loads((whole / "config.json").read_text())["model_type"] == "clip"
    np.testing.assert_allclose(load_extractor("clip", whole)(pixels)["features"], Clip.load(folder)(pixels)["features"])


def test_a_folder_is_named_by_its_files_and_its_dimensions_are_known(folder: Path) -> None:
    place, digest = published_weights("clip", str(folder))
    assert (place, len(digest)) == (str(folder), 64)
    assert feature_dimensions("clip", str(folder)) == 12
    assert feature_dimensions("clip", "openai/clip-vit-large-patch14-336") is None
    hub = published_weights("clip", "openai/clip-vit-large-patch14-336")[1]
    assert hub == "hub:openai/clip-vit-large-patch14-336"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": {"height": 224, "width": 224}}, r"crop_size .*224.*takes 40 x 40 pixels"),
        ({"crop_size": 224}, r"crop_size 224, but the network takes 40 x 40 pixels"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean \[0\.5, 0\.5\]; three numbers"),
        ({"image_mean": 0.5}, r"image_mean 0\.5; three numbers"),
        ({"image_std": [0.2, 0.0, 0.2]}, r"image_std \[0\.2, 0\.0, 0\.2\]; values must be above 0"),
        ({"image_std": [0.2, float("nan"), 0.2]}, "three numbers are needed"),
    ],
)
def test_a_preprocessor_that_does_not_fit_is_refused(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no CLIP at .*({message}).*--clip-weights"):
        Clip.load(clip_folder(tmp_path / "clip", **settings))


def test_the_usual_preprocessor_fits(tmp_path: Path) -> None:
    place = clip_folder(tmp_path / "clip", crop_size={"height": 40, "width": 40}, **OTHERS)
    assert Clip.load(place).preprocess == ClipInput(40, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def test_other_networks_and_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    for number, (change, message) in enumerate(
        [({"model_type": "dinov2"}, "it is a dinov2"), ({"num_hidden_layers": 3}, "tensors are missing")]
    ):
        other = tmp_path / str(number)
        other.mkdir()
        for path in folder.iterdir():
            (other / path.name).write_bytes(path.read_bytes())
        values = json.loads((folder / "config.json").read_text()) | change
        (other / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=f"no CLIP at .*{message}.*openai/clip-vit-large-patch14-336"):
            Clip.load(other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"no CLIP at .*--clip-weights"):
        Clip.load(other)
    weights.unlink()
    with pytest.raises(UserError, match=r"no CLIP at .*--clip-weights"):
        Clip.load(other)


@pytest.mark.parametrize("has_settings", [True, False])
def test_a_hub_id_is_loaded_from_this_machines_cache(
    has_settings: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of the hub's reach. Its settings may be on the hub: without them the usual ones do not take their place."""
    import huggingface_hub.constants

    commit, model = "0" * 40, tmp_path / "models--someone--clip"
    clip_folder(model / "snapshots" / commit, **(OTHERS if has_settings else {}))
    (model / "refs").mkdir()
    (model / "refs/main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    if has_settings:
        assert Clip.load("someone/clip").preprocess == ClipInput(40, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    else:
        with pytest.raises(UserError, match=r"no CLIP at someone/clip: .*--clip-weights"):
            Clip.load("someone/clip")


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"CLIP needs transformers; pip install edt-pipeline\[clip\]"):
        load_extractor("clip", "openai/clip-vit-large-patch14-336")
    assert extractor_spec("clip").option == "--clip-weights"

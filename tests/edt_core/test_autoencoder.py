"""The autoencoder and the classifier: they fit, they store, they come back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from edt_core.autoencoders.autoencoder import (
    autoencoder_facts,
    decode_to_pixels,
    encode_posterior,
    fit_autoencoder,
    load_autoencoder,
    measure_scaling_factor,
    precision_error,
)
from edt_core.config import AutoencoderConfig, ClassifierConfig, result_fields
from edt_core.data.images import center_crop, decode_rgb
from edt_core.errors import UserError
from edt_core.evaluation.extractors.classifier import Classifier, classify, fit_classifier, split_holdout

CONFIG = AutoencoderConfig(downsample_factor=4, base_channels=8, steps=100, batch_size=16, lr=1e-2)


@pytest.fixture(scope="module")
def digits(digits_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    paths = sorted(digits_folder.glob("*/*"))
    images = [center_crop(decode_rgb(path.read_bytes()), 16) for path in paths]
    return np.stack([np.asarray(image) for image in images]), np.array([int(path.parent.name) for path in paths])


@pytest.fixture(scope="module")
def fitted(digits: tuple[np.ndarray, np.ndarray]):
    errors: list[float] = []
    model, facts = fit_autoencoder(CONFIG, digits[0], report=lambda step, mse: errors.append(mse))
    return model, facts, errors


def test_the_fit_learns(fitted) -> None:
    _, facts, errors = fitted
    assert len(errors) == CONFIG.steps
    assert np.mean(errors[-5:]) < 0.3 * np.mean(errors[:5])
    assert facts["mse"] == errors[-1]


def test_scaled_latents_have_unit_variance(fitted, digits: tuple[np.ndarray, np.ndarray]) -> None:
    model, facts, _ = fitted
    mean, std = encode_posterior(model, digits[0]).unbind(1)
    draws = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    assert float((draws * facts["scaling_factor"]).std()) == pytest.approx(1.0, abs=0.02)
    assert model.config.scaling_factor == facts["scaling_factor"]


class Constant(AutoencoderTiny):
    """An autoencoder to which every image is the same."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        """Make no networks."""

    def encode(self, images: torch.Tensor):
        return type("Encoded", (), {"latents": torch.full((len(images), 4, 4, 4), 7.1)})


def test_latents_that_do_not_vary_are_refused(digits: tuple[np.ndarray, np.ndarray]) -> None:
    """A rounded variance of 0 may be a little above or below it: no scaling factor comes of either."""
    with pytest.raises(UserError, match=r"latents do not vary: .* around 7\.1"):
        measure_scaling_factor(Constant(), digits[0], 5)


def test_equal_latents_in_two_precisions_have_an_error_of_0(digits: tuple[np.ndarray, np.ndarray]) -> None:
    assert precision_error(Constant(), Constant(), digits[0][:2], "fp32") == {"max": 0.0, "rms": 0.0}


def test_it_comes_back_from_disk_the_same(fitted, digits: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    model, facts, _ = fitted
    model.save_pretrained(tmp_path / "vae")
    loaded = load_autoencoder(tmp_path / "vae")
    assert autoencoder_facts(loaded) == {
        "downsample_factor": 4,
        "latent_channels": 4,
        "scaling_factor": facts["scaling_factor"],
    }
    gradients = [any(weight.requires_grad for weight in each.parameters()) for each in (model, loaded)]
    assert gradients == [False, False]  # torch.matmul takes other kernels for weights that require one
    assert torch.equal(encode_posterior(model, digits[0]), encode_posterior(loaded, digits[0]))


def test_the_fit_is_a_function_of_its_seed(digits: tuple[np.ndarray, np.ndarray]) -> None:
    short = CONFIG.model_copy(update={"steps": 3})
    torch.manual_seed(1)
    first, _ = fit_autoencoder(short, digits[0])
    torch.manual_seed(2)
    again, _ = fit_autoencoder(short, digits[0])
    other, _ = fit_autoencoder(short.model_copy(update={"seed": 1}), digits[0])
    weights = [model.state_dict()["encoder.conv_in.weight"] for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_mirrored_images_are_fitted_as_well_and_are_a_function_of_the_seed(
    digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    import edt_core.autoencoders.autoencoder as module

    seen: list[np.ndarray] = []
    convert = module.to_model_range
    monkeypatch.setattr(module, "to_model_range", lambda batch: seen.append(batch) or convert(batch))
    plain = CONFIG.model_copy(update={"steps": 3})
    for config in (plain, flipped := plain.model_copy(update={"augment": "flip"}), flipped):
        fit_autoencoder(config, digits[0])
    batches, mirrored, again = (np.stack(seen[at : at + 3]) for at in (0, 3, 6))
    same = (mirrored == batches).all(axis=(2, 3, 4))
    turned = (mirrored == batches[:, :, :, ::-1]).all(axis=(2, 3, 4))
    assert (same | turned).all()  # the same images in the same order, each as it is or mirrored
    assert 0.2 < same.mean() < 0.8
    assert np.array_equal(mirrored, again)


def test_the_default_augmentation_changes_no_fingerprint() -> None:
    assert "augment" not in result_fields(AutoencoderConfig())
    assert result_fields(AutoencoderConfig(augment="flip"))["augment"] == "flip"
    assert AutoencoderConfig(pretrained="a/b", augment="flip").published().augment == "none"


def test_decoded_pixels_are_rounded_without_bias(fitted) -> None:
    class Identity(AutoencoderTiny):
        """A decoder that hands its latents on."""

        dtype = torch.float32
        config = {"scaling_factor": 1.0, "encoder_block_out_channels": (3,)}  # noqa: RUF012

        def __init__(self) -> None:
            """Make no networks."""

        def decode(self, latents: torch.Tensor):
            return type("Output", (), {"sample": latents})

    levels = torch.arange(256, dtype=torch.float32)
    images = (levels / 127.5 - 1.0).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    decoded = decode_to_pixels(Identity(), images, None)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded[0, :, :, 0].ravel(), np.arange(256))


def test_a_missing_autoencoder_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for location in (str(tmp_path / "nothing"), "nobody/no-such-autoencoder"):
        with pytest.raises(UserError, match=r"no autoencoder at .*autoencoder\.pretrained"):
            load_autoencoder(location)


def test_the_classifier_learns_and_comes_back(digits: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    pixels, labels = digits
    config = ClassifierConfig(steps=60, batch_size=16, base_channels=8, feature_dim=16)
    model, facts = fit_classifier(config, pixels, labels, 4)
    features, probabilities = classify(model, pixels)
    assert features.shape == (len(pixels), 16)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert (probabilities.argmax(1) == labels).mean() > 0.9
    assert facts["holdout"] == round(len(pixels) * 0.1)
    model.save(tmp_path)
    again, _ = classify(Classifier.load(tmp_path), pixels)
    assert np.array_equal(features, again)


def test_the_holdout_is_kept_from_the_fit() -> None:
    fitted, held = split_holdout(100, 0.1, 0)
    assert len(held) == 10
    assert np.array_equal(np.sort(np.concatenate([fitted, held])), np.arange(100))

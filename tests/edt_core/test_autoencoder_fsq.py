"""AutoencoderFSQ: it fits, it comes back, its latents are values of codes, and other settings are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.autoencoders.autoencoder import (
    autoencoder_facts,
    build_autoencoder,
    decode_to_pixels,
    encode_posterior,
    fit_autoencoder,
    load_autoencoder,
)
from edt_core.config import AutoencoderConfig, result_fields
from edt_core.data.images import center_crop, decode_rgb
from edt_core.errors import UserError
from edt_core.models.families.codes import codes_of, values_of

CONFIG = AutoencoderConfig(kind="fsq", downsample_factor=4, base_channels=8, steps=40, batch_size=16, lr=1e-2)


@pytest.fixture(scope="module")
def digits(digits_folder: Path) -> np.ndarray:
    images = [center_crop(decode_rgb(path.read_bytes()), 16) for path in sorted(digits_folder.glob("*/*"))[:32]]
    return np.stack([np.asarray(image) for image in images])


@pytest.fixture(scope="module")
def fitted(digits: np.ndarray):
    errors: list[float] = []
    model, facts = fit_autoencoder(CONFIG, digits, report=lambda step, mse: errors.append(mse))
    return model, facts, errors


def test_the_fit_learns_and_counts_its_codes(fitted, digits: np.ndarray) -> None:
    model, facts, errors = fitted
    assert np.mean(errors[-5:]) < 0.5 * np.mean(errors[:5])
    posterior = encode_posterior(model, digits)
    assert torch.equal(values_of(codes_of(posterior[:, 0])), posterior[:, 0])
    assert not posterior[:, 1].any()
    used = len(codes_of(posterior[:, 0]).unique())
    assert facts == {"mse": errors[-1], "scaling_factor": 1.0, "codes_used": used}
    assert used > 4


def test_it_comes_back_from_disk_the_same(fitted, digits: np.ndarray, tmp_path: Path) -> None:
    model, _, _ = fitted
    model.save_pretrained(tmp_path / "vae")
    loaded = load_autoencoder(tmp_path / "vae")
    expected = {"downsample_factor": 4, "latent_channels": 4, "scaling_factor": 1.0, "levels": [8, 5, 5, 5]}
    assert autoencoder_facts(loaded) == expected
    values = encode_posterior(model, digits)[:, 0]
    assert torch.equal(values, encode_posterior(loaded, digits)[:, 0])
    decoded = decode_to_pixels(loaded, values, None).astype(float)
    assert np.square(decoded - digits).mean() < 0.5 * digits.astype(float).var()


def test_other_settings_are_refused(fitted, tmp_path: Path) -> None:
    fitted[0].save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for changed, message in (
        ({"levels": [8, 8, 8]}, r"levels is \[8, 8, 8\], but only \[8, 5, 5, 5\] is supported"),
        ({"scaling_factor": 0.5}, "values of codes are not scaled"),
        ({"latent_channels": 3}, "the codes have 4 channels"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**settings, **changed}))
        with pytest.raises(UserError, match=message):
            load_autoencoder(tmp_path)


def test_fields_without_a_meaning_are_refused_and_the_default_kind_changes_no_fingerprint() -> None:
    with pytest.raises(ValueError, match=r"latent_channels is 8, but the codes of kind fsq"):
        AutoencoderConfig(kind="fsq", latent_channels=8)
    with pytest.raises(ValueError, match=r"kl_weight is 0\.1, but kind is fsq"):
        AutoencoderConfig(kind="fsq", kl_weight=0.1)
    assert "kind" not in result_fields(AutoencoderConfig())
    assert result_fields(CONFIG)["kind"] == "fsq"
    assert AutoencoderConfig(kind="fsq", pretrained="a/b").published().kind == "kl"


def test_images_with_one_code_are_refused(digits: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(config: AutoencoderConfig, image_size: int):
        model = build_autoencoder(config, image_size)
        torch.nn.init.zeros_(model.encoder.conv_out.weight)
        return model.requires_grad_(False).train()

    monkeypatch.setattr("edt_core.autoencoders.autoencoder.build_autoencoder", constant)
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    with pytest.raises(UserError, match="one code for all images"):
        fit_autoencoder(CONFIG.model_copy(update={"steps": 1}), digits)

"""AutoencoderDC: what diffusers' own calls give, and configurations that diffusers would build wrong or fail on."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from edt_core.autoencoders.autoencoder import (
    autoencoder_facts,
    decode,
    encode_both_sides,
    encode_posterior,
    load_autoencoder,
)
from edt_core.autoencoders.check import check_config
from edt_core.errors import UserError
from tests.support.autoencoders import deep_autoencoder

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("dc")
    deep_autoencoder().save_pretrained(folder)
    return load_autoencoder(folder)


def config_of(**settings: Any) -> dict[str, Any]:
    return {**json.loads(deep_autoencoder().to_json_string()), **settings}


def test_latents_and_images_are_those_of_diffusers_own_calls(loaded: Any) -> None:
    posterior = encode_posterior(loaded, PIXELS)
    assert posterior.shape == (3, 2, 32, 2, 2)
    images = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()
    with torch.inference_mode():
        latents = loaded.encode(images).latent
        own = loaded.decode(latents * 0.41407 / 0.41407).sample
        assert torch.equal(decode(loaded, latents * 0.41407, None), own)
    assert torch.equal(posterior[:, 0], latents)
    assert not posterior[:, 1].any()
    ((_, sides),) = encode_both_sides(loaded, [("batch", PIXELS)])
    np.testing.assert_allclose(sides[:, 0], posterior.numpy(), rtol=0, atol=1e-5)  # here in a unit of 16 images
    assert not np.array_equal(sides[:, 1], sides[:, 0])


def test_its_configuration_says_factor_channels_and_scale(loaded: Any) -> None:
    expected = {"downsample_factor": 32, "latent_channels": 32, "scaling_factor": 0.41407}
    assert autoencoder_facts(loaded) == expected


def test_lower_precision_and_a_wrapper_keep_the_kind(loaded: Any) -> None:
    half = deep_autoencoder().to(torch.bfloat16)
    half.load_state_dict(loaded.state_dict())
    low, full = encode_posterior(half, PIXELS)[:, 0], encode_posterior(loaded, PIXELS)[:, 0]
    assert low.dtype == torch.float32
    assert float((low - full).square().mean().sqrt() / full.std()) < 0.05
    compiled = SimpleNamespace(_orig_mod=loaded, config=loaded.config)  # as torch.compile wraps it
    assert autoencoder_facts(compiled) == autoencoder_facts(loaded)


@pytest.mark.parametrize(
    ("factor", "settings"),
    [
        (32, {}),
        (32, {"downsample_block_type": "pixel_unshuffle", "upsample_block_type": "pixel_shuffle"}),
        (32, {"encoder_block_types": "ResBlock", "decoder_act_fns": ["silu"] * 6}),
        (32, {"encoder_layers_per_block": [0, 1, 1, 1, 1, 1], "decoder_layers_per_block": [0, 1, 1, 1, 1, 1]}),
    ],
)
def test_what_is_accepted_is_built_with_the_factor_that_is_read(factor: int, settings: dict[str, Any]) -> None:
    check_config("x", config_of(**settings))
    model = deep_autoencoder(**settings)
    with torch.inference_mode():
        latents = model.encode(torch.zeros(2, 3, 64, 64)).latent
        assert latents.shape == (2, 32, 64 // factor, 64 // factor)
        assert model.decode(latents).sample.shape == (2, 3, 64, 64)
    assert autoencoder_facts(model)["downsample_factor"] == factor


CHANNELS = [8, 8, 16, 16, 32, 32]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder_layers_per_block": [1, 1, 0, 1, 1, 1]}, "each level after the first needs at least 1 layer"),
        ({"decoder_layers_per_block": [1, 1, 1, 1, 1]}, "levels differ: .*decoder_layers_per_block has 5"),
        ({"encoder_block_out_channels": 5}, "encoder_block_out_channels is 5, not a list of levels"),
        ({"encoder_block_out_channels": [8] * 5 + ["8"]}, "not numbers of channels"),
        ({"encoder_block_out_channels": [*CHANNELS[:5], 48]}, "has 48 after 32, which does not divide 128"),
        ({"decoder_block_out_channels": [8, 8, 64, 32, 32, 32]}, "has 64 after 8, which does not divide 32"),
        (
            {"encoder_block_out_channels": [6, 6, *CHANNELS[2:]], "downsample_block_type": "pixel_unshuffle"},
            "has 6 after 6, which is not a multiple of 4",
        ),
        ({"latent_channels": 12}, "encoder_block_out_channels ends with 32, which is not a multiple of the 12 latent"),
        ({"latent_channels": None}, "latent_channels is None, not a number of channels"),
        ({"in_channels": 1}, "in_channels is 1, but images have 3 channels"),
        ({"scaling_factor": 0}, "scaling_factor is 0, not a positive number"),
        ({"shift_factor": 0.1}, r"shift_factor is 0\.1, which diffusers .* ignores"),
    ],
)
def test_what_diffusers_would_build_wrong_or_fail_on_is_refused_by_name(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(**settings)))
    with pytest.raises(UserError, match=rf"cannot be used as autoencoder: in its config\.json .*{message}"):
        load_autoencoder(tmp_path)

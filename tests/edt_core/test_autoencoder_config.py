"""Which diffusers autoencoders are refused, and what the message says to do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from edt_core.autoencoders.autoencoder import build_autoencoder, load_autoencoder
from edt_core.autoencoders.check import check_config
from edt_core.config import AutoencoderConfig
from edt_core.errors import UserError

SMALL = AutoencoderConfig(downsample_factor=4, base_channels=8)


@pytest.fixture(scope="module")
def kl_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kl")
    build_autoencoder(SMALL, 16).save_config(folder)
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from diffusers import AutoencoderTiny

    folder = tmp_path_factory.mktemp("tiny")
    AutoencoderTiny().save_config(folder)
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"force_upcast": False, "sample_size": [16, 16]},
        {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False},
        {"shift_factor": 0.1, "scaling_factor": 1},
        {"latents_mean": [0.0, 1.0, -1.0, 2.0], "latents_std": [1.0, 2.0, 0.5, 1.0], "shift_factor": None},
        {"_name_or_path": "somewhere"},
        {"not_known": None},
    ],
)
def test_settings_that_are_supported(kl_config: dict[str, Any], values: dict[str, Any]) -> None:
    assert check_config("x", {**kl_config, **values})["scaling_factor"] in (0.18215, 1)


def test_defaults_fill_in_what_older_configurations_lack() -> None:
    settings = check_config("x", {"_class_name": "AutoencoderKL"})
    assert (settings["scaling_factor"], settings["latents_mean"]) == (0.18215, None)


def test_the_tiny_autoencoder_is_supported_as_diffusers_saves_it(tiny_config: dict[str, Any]) -> None:
    assert "block_out_channels" in tiny_config  # no argument of its constructor
    assert check_config("x", {**tiny_config, "latent_magnitude": 5, "latent_shift": 0.1})["shift_factor"] == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"in_channels": 1}, "in_channels is 1, but images have 3 channels"),
        ({"out_channels": 4}, "out_channels is 4, but images have 3 channels"),
        ({"scaling_factor": None}, "scaling_factor is None, not a positive number"),
        ({"scaling_factor": 0}, "scaling_factor is 0, not a positive number"),
        ({"scaling_factor": 10**400}, "scaling_factor is 1000+, not a positive number"),
        ({"block_out_channels": 5}, "block_out_channels is 5, not a list of levels"),
        ({"shift_factor": "a"}, "shift_factor is 'a', not a number"),
        ({"shift_factor": float("nan")}, "shift_factor is nan, not a number"),
        ({"latents_mean": [0.0] * 4}, "latents_mean is set without latents_std"),
        ({"latents_std": [1.0] * 4}, "latents_std is set without latents_mean"),
        (
            {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4},
            r"latents_mean is \[.*, not one number for each of the 4",
        ),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 0.0, 1.0, 1.0]}, "latents_std has the value 0.0"),
        (
            {"latents_mean": [1.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1},
            "shift_factor is 0.1 and latents_mean is set too",
        ),
        (
            {"down_block_types": ["DownEncoderBlock2D"]},
            "levels differ: block_out_channels has 3, down_block_types has 1",
        ),
        ({"patch_size": [2, 2]}, r"patch_size is \[2, 2\], which diffusers .* ignores"),
    ],
)
def test_settings_that_are_refused_by_name(kl_config: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^x cannot be used as autoencoder: in its config\.json {message}"):
        check_config("x", {**kl_config, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor is 4, but only 2 is supported"),
        ({"num_encoder_blocks": 3}, "num_encoder_blocks is 3, not a list of levels"),
        ({"num_decoder_blocks": [1, 1, 1]}, "levels differ: .*num_decoder_blocks has 3"),
        ({"latents_mean": [0.0] * 4}, r"latents_mean is \[.*\], which diffusers .* ignores"),
    ],
)
def test_settings_of_the_tiny_autoencoder_that_are_refused(
    tiny_config: dict[str, Any], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_config("x", {**tiny_config, **values})


@pytest.mark.parametrize("name", ["VQModel", "AutoencoderKLWan", "AsymmetricAutoencoderKL"])
def test_other_classes_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name, "latent_channels": 4}))
    names = "AutoencoderKL, AutoencoderTiny, AutoencoderDC and AutoencoderFSQ"
    message = f"cannot be used as autoencoder: it is {name}; {names} are supported"
    with pytest.raises(UserError, match=message):
        load_autoencoder(tmp_path)


def test_a_configuration_of_no_diffusers_class(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(UserError, match=r"has no diffusers class \(_class_name\)"):
        load_autoencoder(tmp_path)


def test_a_pipeline_folder_is_answered_with_its_vae_subfolder(tmp_path: Path) -> None:
    vae = build_autoencoder(SMALL, 16)
    for name in ("a-second", "vae"):
        vae.save_pretrained(tmp_path / name)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match="is the folder of a diffusers pipeline") as raised:
        load_autoencoder(tmp_path)
    answer = re.search("use its vae subfolder: (.+)$", str(raised.value))
    assert answer is not None
    assert load_autoencoder(answer[1]).config.latent_channels == 4


def test_a_pipeline_folder_without_an_autoencoder(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(
        UserError,
        match="vae subfolder of a pipeline with an AutoencoderKL, AutoencoderTiny, AutoencoderDC or AutoencoderFSQ",
    ):
        load_autoencoder(tmp_path)


def test_pickled_weights_are_answered_with_a_command_that_converts_them(tmp_path: Path) -> None:
    vae = build_autoencoder(SMALL, 16)
    vae.save_pretrained(tmp_path / "vae", safe_serialization=False)
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin is a pickle") as raised:
        load_autoencoder(tmp_path / "vae")
    command = re.search('python -c "(.+)"$', str(raised.value))
    assert command is not None
    exec(command[1], {})  # as a shell would have Python do it
    converted = load_autoencoder(tmp_path / "vae-safetensors")
    assert all(torch.equal(value, vae.state_dict()[key]) for key, value in converted.state_dict().items())

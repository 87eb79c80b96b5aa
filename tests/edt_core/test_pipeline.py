"""The diffusers folder: written, loaded by both doors, sampled from."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import edt_core
from edt_core.autoencoders.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig, ChainConfig
from edt_core.errors import UserError
from edt_core.models import model_config
from edt_core.pipeline import PROTOCOL, EDTPipeline, save_pipeline
from edt_core.training.state import initial_model
from tests.support.models import BESIDE_EDT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    edt = initial_model(model_config("EDT-Tiny/2", 32, 4), 0)
    with torch.no_grad():  # the final layer starts at zero: without this every label gives one image
        for parameter in edt.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    vae = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32)
    path = tmp_path_factory.mktemp("pipeline") / "p"
    save_pipeline(
        path, edt.eval(), vae, num_timesteps=1000, classes="abcd", protocol={"num_sampling_steps": 4, "cfg_scale": 2.0}
    )
    return path


def levels(output: Any) -> NDArray[np.int64]:
    """The levels 0..255 of PIL images, [N, S, S, 3]."""
    return np.stack(output.images).astype(np.int64)


def test_it_loads_by_its_own_class_and_by_diffusers(folder: Path) -> None:
    from diffusers import DiffusionPipeline

    own = EDTPipeline.from_pretrained(folder)
    general = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert list(own.config.classes) == list("abcd")
    images = [pipeline([0, 3], output_type="np").images for pipeline in (own, general)]
    assert images[0].shape == (2, 32, 32, 3)
    assert np.array_equal(*images)


@pytest.mark.parametrize("name", BESIDE_EDT)
def test_every_architecture_loads_by_both_doors(folder: Path, tmp_path: Path, name: str) -> None:
    from diffusers import DiffusionPipeline

    model = initial_model(model_config(name, 32, 4), 0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    vae = EDTPipeline.from_pretrained(folder).vae
    save_pipeline(tmp_path / "p", model, vae, num_timesteps=1000, classes="abcd", protocol={"num_sampling_steps": 2})
    assert (tmp_path / "p" / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    own = edt_core.EDTPipeline.from_pretrained(tmp_path / "p")
    general = DiffusionPipeline.from_pretrained(
        tmp_path / "p", custom_pipeline=str(tmp_path / "p"), trust_remote_code=True
    )
    assert own.transformer.edt.config == model.config
    assert all(torch.equal(own.transformer.edt.state_dict()[key], value) for key, value in model.state_dict().items())
    images = [pipeline([0, 3], output_type="np").images for pipeline in (own, general)]
    assert np.array_equal(*images)


@pytest.mark.extern
def test_the_package_gives_the_pipeline_without_being_heavy() -> None:
    code = "import sys, edt_core; assert 'torch' not in sys.modules; print(edt_core.EDTPipeline.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "edt_core.pipeline\n", done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'EDTPipelin'"):
        edt_core.EDTPipelin  # noqa: B018


def test_an_image_is_up_to_rounding_a_function_of_seed_place_and_label(folder: Path) -> None:
    pipeline = EDTPipeline.from_pretrained(folder)
    starts: list[torch.Tensor] = []
    pipeline.transformer.register_forward_pre_hook(lambda _module, inputs: starts.append(inputs[0].clone()))
    three, two = (levels(pipeline(labels, seed=5)) for labels in ([0, 1, 2], [0, 1]))
    first, second = starts[0], starts[len(starts) // 2]  # with guidance both halves of a batch are one input
    assert torch.equal(first[:2], second[:2])  # the noise does not depend on the batch
    assert np.abs(three[:2] - two).max() <= 1  # kernels round by the size of the batch
    assert np.abs(three[:2] - levels(pipeline([0, 1], seed=6))).max() > 1
    assert np.abs(three[:2] - levels(pipeline([3, 1], seed=5))).max() > 1


def test_it_gives_pil_images_by_default(folder: Path) -> None:
    image = EDTPipeline.from_pretrained(folder)([1]).images[0]
    assert image.size == (32, 32)


@pytest.mark.parametrize("labels", [[4], [-1], []])
def test_labels_that_it_does_not_have(folder: Path, labels: list[int]) -> None:
    with pytest.raises(UserError, match=r"(the model has|in) 0\.\.3"):
        EDTPipeline.from_pretrained(folder)(labels)


def test_the_sampling_protocol_is_kept_as_plain_values(folder: Path) -> None:
    kept = json.loads((folder / "model_index.json").read_text())["protocol"]
    # Left out at their defaults, so that older versions read the folder.
    later = {"time_shift", "sde_diffusion", "temperature", "amm_radius_rows", "cache", "guidance_reference"}
    assert set(kept) == set(PROTOCOL) - later == set(ChainConfig.model_fields) - later
    assert (kept["num_sampling_steps"], kept["cfg_scale"], kept["amm_blocks"]) == (4, 2.0, [])
    assert ChainConfig(**EDTPipeline.from_pretrained(folder).config.protocol) == ChainConfig(**kept)


def test_a_folder_of_an_older_version_makes_the_same_images(folder: Path, tmp_path: Path) -> None:
    older = shutil.copytree(folder, tmp_path / "older")
    index = json.loads((older / "model_index.json").read_text())
    old_fields = ("num_sampling_steps", "sampler", "cfg_scale", "guidance_channels", "amm_blocks")
    index["protocol"] = {name: index["protocol"][name] for name in old_fields}
    (older / "model_index.json").write_text(json.dumps(index))
    config = json.loads((older / "transformer" / "config.json").read_text())
    del config["edt_config"]["amm_radius"], config["edt_config"]["architecture"]
    (older / "transformer" / "config.json").write_text(json.dumps(config))
    images = [EDTPipeline.from_pretrained(path)([0, 3], output_type="np").images for path in (older, folder)]
    assert np.array_equal(*images)


def test_options_take_the_place_of_the_kept_ones(folder: Path) -> None:
    pipeline = EDTPipeline.from_pretrained(folder)
    kept = pipeline([0, 3], output_type="np").images
    assert np.array_equal(pipeline([0, 3], output_type="np", num_inference_steps=4, cfg_scale=2).images, kept)
    for options in ({"sampler": "unipc"}, {"guidance_interval": [0, 500]}, {"amm_blocks": [1]}, {"cfg_scale": 3.0}):
        assert not np.array_equal(pipeline([0, 3], output_type="np", **options).images, kept), options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5}, r"unknown options \['steps'\]; known: .*cfg_scale.*num_inference_steps"),
        ({"cfg_scale": 0.5}, r"option 'cfg_scale': .*greater than or equal to 1 \(got 0\.5\)"),
        ({"sampler": "plms"}, "option 'sampler': .*'unipc'.*'plms'"),
        ({"guidance_interval": [5, 2]}, r"guidance_interval is \[5\.0, 2\.0\]; it must be"),
        ({"num_inference_steps": 1001}, "takes 2 to 1000 steps"),
        ({"amm_blocks": [7]}, r"\[7\] do not exist"),
    ],
)
def test_options_that_do_not_exist_or_do_not_fit(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EDTPipeline.from_pretrained(folder)([0], **options)

"""The diffusers folder: written, loaded by both doors, sampled from."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig
from edt_core.errors import UserError
from edt_core.models import model_config
from edt_core.pipeline import EDTPipeline, save_pipeline
from edt_core.training.state import initial_model


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


def test_it_loads_by_its_own_class_and_by_diffusers(folder: Path) -> None:
    from diffusers import DiffusionPipeline

    own = EDTPipeline.from_pretrained(folder)
    general = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert list(own.config.classes) == list("abcd")
    images = [pipeline([0, 3], output_type="np").images for pipeline in (own, general)]
    assert images[0].shape == (2, 32, 32, 3)
    assert np.array_equal(*images)


def test_an_image_is_a_function_of_seed_place_and_label(folder: Path) -> None:
    pipeline = EDTPipeline.from_pretrained(folder)
    three = pipeline([0, 1, 2], output_type="np", seed=5).images
    two = pipeline([0, 1], output_type="np", seed=5).images
    assert np.abs(three[:2].astype(int) - two.astype(int)).max() <= 1  # batched kernels may round the last bit
    assert not np.array_equal(three[:2], pipeline([0, 1], output_type="np", seed=6).images)
    assert not np.array_equal(three[:2], pipeline([3, 1], output_type="np", seed=5).images)


def test_it_gives_pil_images_by_default(folder: Path) -> None:
    image = EDTPipeline.from_pretrained(folder)([1]).images[0]
    assert image.size == (32, 32)


@pytest.mark.parametrize("labels", [[4], [-1], []])
def test_labels_that_it_does_not_have(folder: Path, labels: list[int]) -> None:
    with pytest.raises(UserError, match=r"the model has 0\.\.3"):
        EDTPipeline.from_pretrained(folder)(labels)

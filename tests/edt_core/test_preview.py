"""The sample grid in the midst of a training."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edt_core.autoencoders.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig
from edt_core.models import EDT, model_config
from edt_core.training.preview import Preview, grid

TINY = model_config("EDT-Tiny/2", 32, 4)


@pytest.fixture(scope="module")
def preview(tmp_path_factory: pytest.TempPathFactory) -> Preview:
    folder: Path = tmp_path_factory.mktemp("vae")
    build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32).save_pretrained(folder)
    return Preview(TINY, 1000, folder, torch.device("cpu"))


def test_a_grid_is_a_picture_of_four_by_four_and_the_same_again(preview: Preview) -> None:
    weights = EDT(TINY).state_dict()
    torch.manual_seed(1)
    first = preview.png(weights)
    state = torch.get_rng_state()
    assert preview.png(weights) == first
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn that a training might draw
    assert Image.open(io.BytesIO(first)).size == (128, 128)


def test_other_weights_give_another_picture(preview: Preview) -> None:
    one = EDT(TINY).state_dict()
    other = {name: value + 0.1 * torch.ones_like(value) for name, value in one.items()}
    assert preview.png(one) != preview.png(other)


def test_cells_stand_row_by_row() -> None:
    images = np.stack([np.full((2, 2, 3), i + 1, np.uint8) for i in range(9)])
    laid = grid(images)
    assert laid.shape == (6, 6, 3)
    assert laid[::2, ::2, 0].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]

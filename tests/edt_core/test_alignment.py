"""Weights lie where PyTorch's allocator would put them, wherever a file had them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from edt_core.autoencoders.autoencoder import build_autoencoder, load_autoencoder
from edt_core.config import AutoencoderConfig
from edt_core.models.alignment import ALIGNMENT, align_weights
from edt_core.pipeline import EDTPipeline
from tests.support.models import made_model, pipeline_folder


def is_aligned(module: nn.Module) -> bool:
    return all(value.data_ptr() % ALIGNMENT == 0 for value in module.state_dict().values())


def mapped(layer: nn.Linear, offset: int) -> nn.Linear:
    """The layer with its weights so many bytes into a larger piece of memory, as in a mapped file."""
    memory = torch.empty(layer.weight.numel() + ALIGNMENT)
    first = (offset - memory.data_ptr()) % ALIGNMENT // 4
    place = memory[first : first + layer.weight.numel()].view_as(layer.weight)
    layer.weight.data = place.copy_(layer.weight.data)
    return layer


@pytest.mark.parametrize("offset", [4, 8, 24, 60])
def test_weights_of_a_mapped_file_are_moved_and_stay_equal(offset: int) -> None:
    layer = nn.Linear(24, 40)
    before = layer.weight.detach().clone()
    parameter = mapped(layer, offset).weight
    assert layer.weight.data_ptr() % ALIGNMENT == offset
    assert align_weights(layer) is layer
    assert is_aligned(layer)
    assert layer.weight is parameter  # an optimizer that holds it still does
    assert torch.equal(layer.weight, before)


def test_weights_that_lie_well_stay_where_they_are() -> None:
    layer = nn.Linear(24, 40)
    before = layer.weight.data_ptr()
    assert align_weights(layer).weight.data_ptr() == before
    assert align_weights(nn.Linear(2, 3, device="meta")).weight.is_meta


def test_what_diffusers_loads_is_aligned(tmp_path: Path) -> None:
    folder = pipeline_folder(tmp_path / "pipeline", made_model())
    pipeline = EDTPipeline.from_pretrained(folder)
    assert is_aligned(pipeline.transformer)
    assert is_aligned(pipeline.vae)
    build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32).save_pretrained(tmp_path / "vae")
    assert is_aligned(load_autoencoder(tmp_path / "vae"))

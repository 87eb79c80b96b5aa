"""The memory of a forward pass, counted without computing it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edt_core.models import ModelConfig, build_model
from edt_core.sampling.memory import PeakMemory, forward_memory
from tests.support.models import TINY, shallow_config
from tests.support.trainings import narrow


def test_bytes_are_counted_while_they_are_there() -> None:
    with PeakMemory() as peak:
        first = torch.empty(1000)
        second = first.view(10, 100) * 2  # the view has no bytes of its own
        assert (peak.now, peak.most) == (8000, 8000)
        second.add_(1)
        total = second + first.view(10, 100)
        assert peak.now == 12000
        del first, second
        assert (peak.now, peak.most) == (4000, 12000)
        del total
    assert (peak.now, peak.most) == (0, 12000)


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_what_is_counted_is_what_a_forward_pass_takes(name: str) -> None:
    config = shallow_config(name)
    model = build_model(config).eval()
    with PeakMemory() as peak:
        side = config.latent_size
        model(torch.empty(3, config.in_channels, side, side), torch.zeros(3).long(), torch.zeros(3).long())
    memory = forward_memory(config, 3)
    assert memory.activations == peak.most
    assert memory.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert memory.total == memory.weights + memory.activations


def test_it_grows_with_the_images_and_not_with_modulation() -> None:
    config: ModelConfig = replace(narrow(), latent_size=16)
    small, large = (forward_memory(config, images) for images in (64, 128))
    assert small.weights == large.weights
    assert 1.9 < large.activations / small.activations <= 2
    assert forward_memory(replace(config, amm_blocks=(0, 2)), 64) == small

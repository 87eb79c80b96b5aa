"""Large images are encoded and decoded in parts of a fixed size, so that one tensor of the autoencoder is bounded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny

from edt_core.autoencoders import parts
from edt_core.autoencoders.autoencoder import decode, decode_to_pixels
from edt_core.autoencoders.parts import images_per_call, in_parts

SD_VAE_CHANNELS = 256  # of its largest tensor, as many as pixels
FACTOR, SIDE = 4, 16


@pytest.fixture(scope="module")
def model() -> Any:
    """A small autoencoder whose convolutions do not mix images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
    return tiny.eval().requires_grad_(False)


@contextmanager
def calls(model: Any) -> Iterator[list[int]]:
    """The numbers of images that the decoder is called with."""
    numbers: list[int] = []
    hook = model.decoder.register_forward_pre_hook(lambda _module, inputs: numbers.append(len(inputs[0])))
    try:
        yield numbers
    finally:
        hook.remove()


def test_the_number_follows_from_the_image_size() -> None:
    assert [images_per_call(side) for side in (64, 256, 320, 384, 512, 768, 1024, 2048)] == [
        1024,
        64,
        20,
        14,
        8,
        3,
        2,
        1,
    ]
    for side in range(8, 1449, 8):  # for larger ones a single image is above the bound
        assert images_per_call(side) * side**2 * SD_VAE_CHANNELS <= 1 << 30, side


def test_parts_cover_each_image_once() -> None:
    for count in range(20):
        slices = list(in_parts(count, 512))
        assert [place for part in slices for place in range(count)[part]] == list(range(count))
        assert all(part.stop - part.start == 8 for part in slices[:-1])


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (8, [8]), (11, [8, 3]), (16, [8, 8])])
def test_a_decoder_is_called_with_so_many_images_and_gives_what_single_calls_give(
    count: int, expected: list[int], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the bound of 512 px, but for small images: 8 of them at once."""
    monkeypatch.setattr(parts, "_PIXELS", 8 * SIDE**2)
    latents = torch.randn(count, 4, SIDE // FACTOR, SIDE // FACTOR, generator=torch.Generator().manual_seed(1))
    with calls(model) as numbers:
        images = decode(model, latents, None)
    assert numbers == expected
    raw = latents / model.config.scaling_factor
    singles = torch.cat([model.decode(raw[k : k + 1]).sample for k in range(count)])
    assert torch.allclose(images, singles, atol=1e-5)
    by_hand = torch.cat([model.decode(raw[k : k + 8]).sample for k in range(0, count, 8)])
    assert torch.equal(images, by_hand)


def test_units_of_up_to_256_px_are_decoded_whole_as_before(model: Any) -> None:
    for side, count in ((32, 100), (256, 64)):
        assert images_per_call(side) >= count
    latents = torch.randn(64, 4, SIDE // FACTOR, SIDE // FACTOR, generator=torch.Generator().manual_seed(1))
    with calls(model) as numbers:
        pixels = decode_to_pixels(model, latents, None)
    assert numbers == [64]
    assert pixels.shape == (64, SIDE, SIDE, 3)

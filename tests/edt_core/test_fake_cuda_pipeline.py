"""The diffusers folder on tensors that say they are on a GPU: every family, every form of output, other schedulers.

Not covered: reading the folder, which is done on the host; the program of `edt export`, which is traced and checked on
the CPU wherever the model was; and the offload of diffusers, whose hooks need a driver.
"""

from pathlib import Path

import diffusers
import pytest
import torch

from edt_core.diffusion import noise
from edt_core.pipeline import EDTPipeline
from edt_core.sampling.schedulers import SUPPORTED
from tests.support.cases import suite_of
from tests.support.fake_cuda import CUDA, fake_cuda, on_cuda, waits
from tests.support.models import TINY, drawn_weights, pipeline_folder

LABELS, STEPS = [1, 0], 4
READ, COPIED = "value read on the host", "copy to the host"
FLAGS = [READ] * len(LABELS)  # of which latents are finite; one copy on a GPU, here a list is read value by value
# After the chain: whether the decoded images are finite, and the copy of their pixels.
OUTPUTS = {"latent": [], "pt": [READ], "np": [READ, COPIED], "pil": [READ, COPIED]}


@pytest.fixture(autouse=True)
def _no_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs a driver, and a thread draws noise ahead, beside the mode."""
    draw = noise.sample_noise
    monkeypatch.setattr(noise, "sample_noise", lambda *args, pin=False, **named: draw(*args, **named))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a DiT."""
    return pipeline_folder(tmp_path_factory.mktemp("plain") / "pipeline", drawn_weights("DiT-Tiny/2"))


def opened(folder: Path) -> EDTPipeline:
    pipeline = EDTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def to_cuda(pipeline: EDTPipeline) -> EDTPipeline:
    on_cuda(pipeline.transformer)
    on_cuda(pipeline.vae)
    return pipeline


@pytest.mark.parametrize("name", TINY)
def test_a_folder_makes_images_on_a_gpu(name: str, tmp_path: Path) -> None:
    pipeline = opened(pipeline_folder(tmp_path / "pipeline", drawn_weights(name)))
    with fake_cuda() as mode:
        to_cuda(pipeline)
        for output_type, after_chain in OUTPUTS.items():
            with waits(mode, *FLAGS, *after_chain):
                images = pipeline(LABELS, num_inference_steps=2, guidance_scale=2.0, output_type=output_type).images
            assert len(images) == len(LABELS)
            if output_type in ("latent", "pt"):
                assert isinstance(images, torch.Tensor)
                assert images.device == CUDA
    assert images[0].size == (32, 32)


# One draws noise, one does not, one calls the model twice a step, one keeps earlier outputs, and one solves equations.
KINDS = [
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]


@pytest.mark.parametrize("name", suite_of(KINDS, SUPPORTED))
def test_an_assigned_scheduler_runs_on_a_gpu(name: str, plain: Path) -> None:
    """Where the host waits is diffusers' affair; no operation mixes devices."""
    pipeline = opened(plain)
    if name != type(pipeline.scheduler).__name__:
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    with fake_cuda():
        to_cuda(pipeline)
        latents = pipeline(LABELS, num_inference_steps=STEPS, output_type="latent").images
    assert latents.device == CUDA
    assert latents.shape == (len(LABELS), 4, 8, 8)

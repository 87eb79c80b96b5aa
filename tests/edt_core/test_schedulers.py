"""Schedulers of diffusers that a user assigns: honoured as diffusers' own pipelines do, or refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from edt_core.errors import UserError
from edt_core.pipeline import EDTPipeline, save_pipeline
from edt_core.sampling.schedulers import SUPPORTED
from tests.support.pipelines import quiet, small_pipeline

LABELS = [3, 1, 0]
STEPS, SCALE, CLASSES = 8, 2.5, 4
WITHOUT_SCALE = ("DDIM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "PNDM", "UniPCMultistep")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """diffusers guides all channels of the latents."""
    return small_pipeline(tmp_path_factory.mktemp("pipeline") / "p", guidance_channels=None)


@pytest.fixture
def pipeline(folder: Path) -> EDTPipeline:
    return quiet(EDTPipeline.from_pretrained(folder))


def assigned(pipeline: EDTPipeline, name: str, **config: Any) -> EDTPipeline:
    """The pipeline with a scheduler that is made as diffusers' guides say."""
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **config)
    return pipeline


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def drawn(pipeline: EDTPipeline, **options: Any) -> Tensor:
    latents: Tensor = pipeline(LABELS, output_type="latent", **{"num_inference_steps": STEPS, **options}).images
    return latents


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class AsDiT(nn.Module):
    """Our denoiser with the interface of diffusers' DiT, for diffusers' own pipeline."""

    def __init__(self, pipeline: EDTPipeline) -> None:
        super().__init__()
        self.model = pipeline.transformer
        self.config = SimpleNamespace(sample_size=8, in_channels=4, out_channels=8)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.model(x, timestep, class_labels.clamp(max=CLASSES)))  # 1000 is its null


@pytest.mark.parametrize("name", WITHOUT_SCALE)
def test_latents_are_those_of_diffusers_own_pipeline(pipeline: EDTPipeline, name: str) -> None:
    """DiTPipeline, which does not scale its start: for schedulers whose noise has unit variance."""
    ours = drawn(assigned(pipeline, f"{name}Scheduler"), guidance_scale=SCALE, generator=generator())
    decode, seen = pipeline.vae.decode, []
    pipeline.vae.decode = lambda latents: seen.append(latents) or decode(latents)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, variance_type=None)
    theirs = DiTPipeline(AsDiT(pipeline), pipeline.vae, scheduler)
    theirs.set_progress_bar_config(disable=True)
    images = theirs(LABELS, SCALE, generator(), STEPS, output_type="np").images
    assert_close(ours, seen[0] * pipeline.vae.config.scaling_factor)
    own = pipeline(LABELS, num_inference_steps=STEPS, guidance_scale=SCALE, generator=generator(), output_type="np")
    np.testing.assert_allclose(own.images, images, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(SUPPORTED) - {f"{name}Scheduler" for name in WITHOUT_SCALE}))
def test_latents_are_those_of_the_usual_loop(pipeline: EDTPipeline, name: str) -> None:
    """The loop of diffusers' Stable Diffusion, with scaled start and input and the generator in each step."""
    config = {"timestep_spacing": "trailing"} if name == "DDPMScheduler" else {}  # another one than the pipeline's own
    ours = drawn(assigned(pipeline, name, **config), guidance_scale=SCALE, generator=generator())
    scheduler, random = type(pipeline.scheduler).from_config(pipeline.scheduler.config), generator()
    scheduler.set_timesteps(STEPS)
    x = torch.randn(3, 4, 8, 8, generator=random) * scheduler.init_noise_sigma
    labels = torch.tensor([*LABELS, *[CLASSES] * 3])
    known = {} if name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler") else random
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = pipeline.transformer(scheduler.scale_model_input(torch.cat([x, x]), t), t.expand(6), labels)
        (eps, v), (null, _) = ((half[:, :4], half[:, 4:]) for half in output.chunk(2))
        guided = null + SCALE * (eps - null)
        predicted = torch.cat([guided, v], dim=1) if name == "DDPMScheduler" else guided
        x = scheduler.step(predicted, t, x, **({"generator": known} if known else {})).prev_sample
    assert_close(ours, x)


@pytest.fixture(scope="module")
def short(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as if it was trained on 50 timesteps: all of them can be visited."""
    whole, path = EDTPipeline.from_pretrained(folder), tmp_path_factory.mktemp("short") / "p"
    protocol = {**whole.config.protocol, "num_sampling_steps": 50}
    save_pipeline(path, whole.transformer.edt, whole.vae, num_timesteps=50, classes="abcd", protocol=protocol)
    return path


@pytest.mark.parametrize(
    ("name", "sampler"),
    [("DDPMScheduler", "ancestral"), ("DDIMScheduler", "ddim"), ("DPMSolverMultistepScheduler", "dpmsolver++")],
)
def test_over_all_timesteps_a_scheduler_does_as_our_sampler(short: Path, name: str, sampler: str) -> None:
    pipeline = quiet(EDTPipeline.from_pretrained(short))
    options = {"num_inference_steps": 50, "generator": generator()}
    ours = drawn(pipeline, sampler=sampler, **options)
    theirs = drawn(assigned(pipeline, name, timestep_spacing="trailing"), **{**options, "generator": generator()})
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_without_a_generator_noise_is_of_seed_and_place(pipeline: EDTPipeline, name: str) -> None:
    assigned(pipeline, name)
    before = dict(pipeline.scheduler.__dict__)
    three = drawn(pipeline, seed=5)
    assert torch.equal(drawn(pipeline, seed=5), three)
    assert not torch.equal(drawn(pipeline, seed=6), three)
    two = pipeline(LABELS[:2], output_type="latent", num_inference_steps=STEPS, seed=5).images
    assert_close(two, three[:2])
    assert all(pipeline.scheduler.__dict__[key] is value for key, value in before.items())  # a copy runs


def test_our_options_reach_a_scheduler(pipeline: EDTPipeline) -> None:
    assigned(pipeline, "DDIMScheduler")
    plain = drawn(pipeline)
    assert torch.equal(drawn(pipeline, guidance_interval=[0, 1000]), plain)
    for options in ({"guidance_interval": [0, 500]}, {"amm_blocks": [1]}, {"cfg_scale": 1.0}, {"cfg_power": 2.0}):
        assert not torch.equal(drawn(pipeline, **options), plain), options


def test_it_is_saved_and_loaded_and_copied(pipeline: EDTPipeline, tmp_path: Path) -> None:
    expected = drawn(assigned(pipeline, "EulerDiscreteScheduler"))
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(EDTPipeline.from_pretrained(tmp_path))
    assert type(loaded.scheduler) is EulerDiscreteScheduler
    assert torch.equal(drawn(loaded), expected)
    assert torch.equal(drawn(quiet(EDTPipeline(**loaded.components))), expected)


def test_the_own_scheduler_made_again_is_the_own_one(pipeline: EDTPipeline) -> None:
    expected = drawn(pipeline, sampler="unipc")
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert torch.equal(drawn(pipeline, sampler="unipc"), expected)


REFUSED = [
    (lambda _: diffusers.EDMEulerScheduler(), "EDMEulerScheduler cannot sample .*: it is not one of DDIMScheduler"),
    (lambda _: diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler cannot sample"),
    (lambda _: DDIMScheduler(), "clip_sample is True, but latents have no fixed range"),
    (lambda c: DDIMScheduler.from_config(c, thresholding=True), "thresholding is True"),
    (lambda c: DDIMScheduler.from_config(c, prediction_type="v_prediction"), "prediction_type is 'v_prediction'"),
    (lambda c: DPMSolverMultistepScheduler.from_config(c, beta_end=0.012), "its noise schedule is not the linear one"),
    (lambda c: DPMSolverMultistepScheduler.from_config(c, beta_schedule="scaled_linear"), "its noise schedule"),
    (lambda c: DDIMScheduler.from_config(c, num_train_timesteps=500), "of 1000 timesteps that the model was trained"),
    (lambda c: DDPMScheduler.from_config(c, rescale_betas_zero_snr=True), "its noise schedule"),
    (lambda _: object(), "object cannot sample"),
    (lambda _: None, "NoneType cannot sample"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_does_not_fit_is_refused_when_it_is_assigned(folder: Path, make: Any, message: str) -> None:
    pipeline = quiet(EDTPipeline.from_pretrained(folder))
    own = pipeline.scheduler
    with pytest.raises(UserError, match=rf"{message}(.|\n)*use the option sampler, one of 'ancestral', 'ddim'"):
        pipeline.scheduler = make(own.config)
    assert pipeline.scheduler is own
    assert pipeline.config.scheduler == ("diffusers", "DDPMScheduler")


def test_what_does_not_fit_is_refused_when_it_is_loaded_or_changed_in_place(folder: Path) -> None:
    with pytest.raises(UserError, match="clip_sample is True"):
        EDTPipeline.from_pretrained(folder, scheduler=DDIMScheduler())
    pipeline = quiet(EDTPipeline.from_pretrained(folder))
    pipeline.scheduler.register_to_config(clip_sample=True)
    with pytest.raises(UserError, match="clip_sample is True"):
        drawn(pipeline)


def test_a_sampler_and_a_scheduler_exclude_each_other(pipeline: EDTPipeline) -> None:
    assigned(pipeline, "DDIMScheduler")
    with pytest.raises(UserError, match="sampler is 'unipc', but the pipeline has a DDIMScheduler"):
        drawn(pipeline, sampler="unipc")


def test_verbs_say_that_they_do_not_use_it(
    pipeline: EDTPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from jobs.models.open import load_model

    assigned(pipeline, "EulerDiscreteScheduler").save_pretrained(tmp_path / "p")
    with caplog.at_level("WARNING", logger="jobs.models.open"):
        assert load_model(str(tmp_path / "p")).num_timesteps == 1000
    assert "its scheduler, EulerDiscreteScheduler, is not used; set the sampler with the option sampler" in caplog.text

"""A model of flow matching as a diffusers pipeline: its folder, and diffusers' schedulers against the own samplers."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from edt_core.autoencoders.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig
from edt_core.diffusion import objective_of, with_objective
from edt_core.diffusion.flow_chains import ode_times
from edt_core.errors import UserError
from edt_core.models import model_config
from edt_core.pipeline import EDTPipeline, save_pipeline
from edt_core.sampling.flow_schedulers import SUPPORTED, FlowSchedulerChain
from edt_core.training.state import initial_model
from jobs.models.open import load_model
from tests.support.pipelines import quiet

FLOW = objective_of("flow")
LABELS = [3, 1, 0]
EULER, HEUN = SUPPORTED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of four classes, whose protocol names no sampler."""
    edt = initial_model(with_objective(model_config("EDT-Tiny/2", 32, 4), "flow"), 0)
    with torch.no_grad():  # the final layer starts at zero
        for parameter in edt.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    vae = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32)
    path = tmp_path_factory.mktemp("flow") / "p"
    protocol = {"num_sampling_steps": 5, "cfg_scale": 2.0}
    save_pipeline(path, edt.eval(), vae, num_timesteps=1000, classes="abcd", protocol=protocol)
    return path


@pytest.fixture
def pipeline(folder: Path) -> EDTPipeline:
    return quiet(EDTPipeline.from_pretrained(folder))


def latents(pipeline: Any, **options: Any) -> Tensor:
    made: Tensor = pipeline(LABELS, output_type="latent", **options).images
    return made


def test_a_folder_is_loaded_by_diffusers_alone_and_samples_by_euler(folder: Path, pipeline: EDTPipeline) -> None:
    assert type(pipeline.scheduler).__name__ == EULER
    assert pipeline.config.protocol["sampler"] == "euler"
    assert not {"time_shift", "sde_diffusion"} & pipeline.config.protocol.keys()
    plain = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert torch.equal(latents(quiet(plain)), latents(pipeline))
    assert load_model(str(folder)).model.config.objective == "flow"
    for sampler in FLOW.samplers:
        assert latents(pipeline, sampler=sampler).isfinite().all()
    with pytest.raises(UserError, match="sampler is 'ddim', but a model of the objective 'flow'"):
        latents(pipeline, sampler="ddim")


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_euler_scheduler_of_diffusers_makes_the_steps_of_the_own_one(pipeline: EDTPipeline, shift: float) -> None:
    own = latents(pipeline, time_shift=shift)
    # A scheduler like that of the folder is not used, so this one has a setting of its own.
    pipeline.scheduler = getattr(diffusers, EULER)(shift=shift, base_shift=0.6)
    torch.testing.assert_close(latents(pipeline), own, rtol=0, atol=1e-5)


def shifted(pipeline: EDTPipeline, folder: Path, shift: float) -> Path:
    """A folder of the same model whose protocol has a time shift."""
    protocol = {"num_sampling_steps": 5, "cfg_scale": 2.0, "time_shift": shift}
    save_pipeline(folder, pipeline.transformer.edt, pipeline.vae, num_timesteps=1000, classes="abcd", protocol=protocol)
    return folder


def test_a_folder_states_the_shift_for_diffusers(pipeline: EDTPipeline, tmp_path: Path) -> None:
    """With noise levels 1 to 1/N, as diffusers' pipeline of FLUX gives them, its scheduler makes our steps."""
    folder, shift, steps = shifted(pipeline, tmp_path / "shifted", 3.0), 3.0, 7
    scheduler = getattr(diffusers, EULER).from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    times = 1 - np.array(ode_times(steps, shift))
    np.testing.assert_allclose(scheduler.sigmas.numpy(), times, rtol=0, atol=1e-6)
    np.testing.assert_allclose(scheduler.timesteps.numpy(), 1000 * times[:-1], rtol=0, atol=1e-3)
    # Without them it ends at the level of the first of its 1,000 timesteps, which it shifts twice.
    scheduler.set_timesteps(steps)
    last = shift * 0.001 / (1 + (shift - 1) * 0.001)
    assert float(scheduler.sigmas[-2]) == pytest.approx(shift * last / (1 + (shift - 1) * last), rel=1e-3)

    own = quiet(EDTPipeline.from_pretrained(folder))
    assert torch.equal(latents(own), latents(pipeline, time_shift=shift))
    assert not torch.allclose(latents(own), latents(pipeline), atol=1e-3)
    own.scheduler = getattr(diffusers, EULER)()  # another one now: without the shift
    torch.testing.assert_close(latents(own), latents(pipeline), rtol=0, atol=1e-5)


def test_a_folder_whose_scheduler_does_not_state_the_shift_is_sampled_by_its_protocol(
    pipeline: EDTPipeline, tmp_path: Path
) -> None:
    folder = shifted(pipeline, tmp_path / "older", 3.0)
    getattr(diffusers, EULER)().save_pretrained(folder / "scheduler")
    older = quiet(EDTPipeline.from_pretrained(folder))
    assert older.scheduler.config.shift == 3.0
    assert torch.equal(latents(older), latents(pipeline, time_shift=3.0))


def test_the_guidance_interval_is_in_the_time_of_the_flow(pipeline: EDTPipeline) -> None:
    own = latents(pipeline, guidance_interval=(0.3, 0.7))
    assert not torch.allclose(own, latents(pipeline), atol=1e-3)
    pipeline.scheduler = getattr(diffusers, EULER)(base_shift=0.6)
    torch.testing.assert_close(latents(pipeline, guidance_interval=(0.3, 0.7)), own, rtol=0, atol=1e-5)


def test_chains_of_schedulers_integrate_a_known_velocity() -> None:
    """Data of N(m, s²): noise z flows to m + s z. Both schedulers get near it, Heun's nearer."""
    start, mean, std = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(1)), 0.5, 0.4

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        time = t.reshape(-1, 1, 1, 1)
        variance = time**2 * std**2 + (1 - time) ** 2
        return mean + (time * std**2 - (1 - time)) / variance * (x - time * mean)

    def error(name: str) -> float:
        scheduler = getattr(diffusers, name)()
        chain = FlowSchedulerChain(scheduler, FLOW, 50, torch.device("cpu"), None)
        return float((chain(velocity, start) - (mean + std * start)).abs().max())

    assert error(HEUN) < error(EULER) < 0.05
    assert error(HEUN) < 0.01


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (lambda: diffusers.DDIMScheduler(), "it is not one of FlowMatchEulerDiscreteScheduler"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting is True"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas is True"),
    ],
)
def test_schedulers_that_do_not_fit(pipeline: EDTPipeline, scheduler: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.scheduler = scheduler()


def test_heun_of_diffusers_is_supported(pipeline: EDTPipeline) -> None:
    pipeline.scheduler = getattr(diffusers, HEUN).from_config(pipeline.scheduler.config)
    assert latents(pipeline).isfinite().all()
    with pytest.raises(UserError, match="replaces it; leave the option out"):
        latents(pipeline, sampler="sde")

"""The multistep solvers, against data whose exact prediction and exact trajectory are known."""

import math
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from edt_core import diffusion
from edt_core.diffusion import Schedule, linear_schedule, objective_of, sampling_schedule
from edt_core.diffusion.sampling import SamplingMethod
from edt_core.diffusion.schedule import spaced_timesteps
from edt_core.diffusion.solvers import SolverName

FULL = linear_schedule()
sample = partial(diffusion.sample, objective=objective_of("epsilon"))
SOLVERS: tuple[SolverName, ...] = get_args(SolverName)
MEAN, STD = 0.3, 0.5  # data is N(MEAN, STD²), every number on its own
START = torch.randn(64, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def gaussian_model(x: Tensor, t: Tensor) -> Tensor:
    """The expected noise of x_t for Gaussian data, and a variance that nobody should use."""
    ab = torch.from_numpy(FULL.alphas_cumprod)[t].float()[:, None, None, None]
    eps = (1 - ab).sqrt() * (x - ab.sqrt() * MEAN) / (ab * STD**2 + 1 - ab)
    return torch.cat([eps, torch.full_like(eps, torch.nan)], dim=1)


def exact() -> Tensor:
    """The end of the probability-flow ODE from START: it keeps the number of standard deviations."""
    ab = float(FULL.alphas_cumprod[-1])
    return MEAN + STD * (START - math.sqrt(ab) * MEAN) / math.sqrt(ab * STD**2 + 1 - ab)


def error(method: SamplingMethod, steps: int) -> float:
    out = sample(gaussian_model, START, sampling_schedule(FULL, steps, method), method)
    return float((out - exact()).square().mean().sqrt())


def test_ddim_of_all_steps_comes_close_to_the_exact_end() -> None:
    assert error("ddim", 1000) < 0.004


@pytest.mark.parametrize("method", SOLVERS)
def test_a_solver_is_better_than_ddim_in_as_many_steps(method: SolverName) -> None:
    assert error(method, 20) < error("ddim", 20) / 2
    assert error(method, 40) < error("ddim", 40) / 10


@pytest.mark.parametrize("method", SOLVERS)
def test_a_solver_converges_with_second_order(method: SolverName) -> None:
    """Four times the steps: a sixteenth of the error or less, where DDIM has a fourth."""
    assert error(method, 80) < error(method, 20) / 16
    assert error("ddim", 80) > error("ddim", 20) / 6


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("steps", [2, 3, 14, 15, 61, 1000])
def test_any_number_of_steps_ends_in_numbers(method: SolverName, steps: int) -> None:
    seen: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return gaussian_model(x, t)

    out = sample(model, START, sampling_schedule(FULL, steps, method), method)
    assert out.isfinite().all()
    assert out.dtype == torch.float32
    assert len(seen) == steps
    assert seen[0] == 999
    assert seen == sorted(set(seen), reverse=True)


@pytest.mark.parametrize("method", SOLVERS)
def test_a_sample_is_the_same_again_and_in_any_batch(method: SolverName) -> None:
    schedule = sampling_schedule(FULL, 12, method)
    whole = sample(gaussian_model, START, schedule, method)
    assert torch.equal(sample(gaussian_model, START, schedule, method), whole)
    torch.testing.assert_close(sample(gaussian_model, START[5:8], schedule, method), whole[5:8])


@pytest.mark.parametrize("method", SOLVERS)
def test_the_steps_are_those_of_diffusers_on_the_whole_schedule(method: SolverName) -> None:
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kind = DPMSolverMultistepScheduler if method == "dpmsolver++" else UniPCMultistepScheduler
    scheduler = kind(num_train_timesteps=1000, trained_betas=FULL.betas, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    x = START
    for t in scheduler.timesteps:
        eps = gaussian_model(x, t.expand(len(x)))[:, :4]
        x = scheduler.step(eps, t, x).prev_sample
    ours = sample(gaussian_model, START, sampling_schedule(FULL, 20, method), method)
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-4)  # its betas are float32


@pytest.mark.parametrize("num_timesteps", [21, 100, 1000])
def test_trailing_timesteps_cut_the_chain_into_even_parts(num_timesteps: int) -> None:
    for steps in range(2, num_timesteps + 1):
        kept = spaced_timesteps(num_timesteps, steps, "trailing")
        gaps = np.diff(kept, prepend=-1)
        assert (len(kept), kept[-1]) == (steps, num_timesteps - 1)
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("method", "least"), [("ancestral", 0), ("ddim", 0), ("unipc", 49), ("dpmsolver++", 49)])
def test_the_timesteps_that_a_method_visits(method: SamplingMethod, least: int) -> None:
    schedule: Schedule = sampling_schedule(FULL, 20, method)
    assert (schedule.num_timesteps, schedule.timestep_map[0], schedule.timestep_map[-1]) == (20, least, 999)


def test_solvers_take_no_share_of_noise() -> None:
    with pytest.raises(ValueError, match=r"eta is 0\.5 with method 'unipc'"):
        sample(gaussian_model, START, sampling_schedule(FULL, 5, "unipc"), "unipc", eta=0.5)

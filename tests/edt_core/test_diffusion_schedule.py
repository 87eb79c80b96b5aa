"""The schedule, its respacing, and the chains that run over it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edt_core import diffusion
from edt_core.diffusion import Schedule, linear_schedule, objective_of, respace
from edt_core.diffusion.sampling import ddim_sigma
from edt_core.diffusion.schedule import spaced_timesteps

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "diffusion.npz")
sample = partial(diffusion.sample, objective=objective_of("epsilon"))


def stand_in_model(x: Tensor, t: Tensor) -> Tensor:
    share = (t.float() / 1000)[:, None, None, None]
    return torch.cat([x * share + 0.1 * torch.tanh(x), torch.tanh(x * (1 - share))], dim=1)


def golden_chain(steps: int) -> tuple[Tensor, Callable[[int], Tensor]]:
    """The reference's start and step noises, which come from one stream."""
    stream = np.random.RandomState(steps)
    draws = [torch.from_numpy(stream.randn(2, 4, 8, 8)).float() for _ in range(1 + steps)]
    return draws[0], lambda step: draws[1 + step]


def assert_close(actual: Tensor, name: str) -> None:
    expected = GOLDEN[name]
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_linear_schedule_meets_the_reference() -> None:
    schedule = linear_schedule()
    np.testing.assert_allclose(schedule.alphas_cumprod, GOLDEN["alphas_cumprod"], rtol=1e-12)
    np.testing.assert_allclose(
        schedule.posterior_log_variance_clipped, GOLDEN["posterior_log_variance_clipped"], rtol=1e-12
    )


def test_coefficients_agree_for_one_timestep_and_for_many() -> None:
    schedule = linear_schedule()
    t = torch.tensor([0, 7, 999])
    gathered = schedule.gather(t, ndim=4)
    for row, index in enumerate(t.tolist()):
        for one, many in zip(schedule.at(index), gathered, strict=True):
            assert isinstance(many, Tensor)
            assert many.shape == (3, 1, 1, 1)
            assert many[row].item() == pytest.approx(one, rel=1e-6)


def test_coefficients_first_used_while_sampling_still_serve_training() -> None:
    schedule = linear_schedule(100)
    with torch.inference_mode():
        schedule.gather(torch.tensor([3]), ndim=2)
    x = torch.ones(1, 4, requires_grad=True)
    (x * schedule.gather(torch.tensor([3]), ndim=2).signal_scale).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("num_timesteps", [100, 1000])
@pytest.mark.parametrize("steps", [2, 7, 50, 99, 100])
def test_spaced_timesteps_are_an_even_subset_with_both_ends(num_timesteps: int, steps: int) -> None:
    kept = spaced_timesteps(num_timesteps, steps)
    gaps = np.diff(kept)
    assert (len(kept), kept[0], kept[-1]) == (steps, 0, num_timesteps - 1)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_respacing_keeps_the_noise_levels_of_the_timesteps_it_keeps() -> None:
    full = linear_schedule()
    short = respace(full, 50)
    np.testing.assert_allclose(short.alphas_cumprod, full.alphas_cumprod[short.timestep_map], rtol=1e-12)
    np.testing.assert_allclose(respace(full, 1000).betas, full.betas, rtol=1e-9)


def test_respacing_twice_still_names_the_trained_timesteps() -> None:
    twice = respace(respace(linear_schedule(), 100), 10)
    np.testing.assert_allclose(twice.alphas_cumprod, linear_schedule().alphas_cumprod[twice.timestep_map], rtol=1e-12)


@pytest.mark.parametrize("steps", [50, 250])
def test_chains_meet_the_reference(steps: int) -> None:
    schedule = respace(linear_schedule(), steps)
    np.testing.assert_array_equal(schedule.timestep_map, GOLDEN[f"sample{steps}.timestep_map"])
    initial, noise = golden_chain(steps)
    np.testing.assert_array_equal(initial.numpy(), GOLDEN[f"sample{steps}.x_T"])
    assert_close(sample(stand_in_model, initial, schedule, noise=noise), f"sample{steps}.x_0")
    assert_close(sample(stand_in_model, initial, schedule, "ddim"), f"sample{steps}.ddim_x_0")


@pytest.fixture
def short() -> Schedule:
    return respace(linear_schedule(), 5)


def test_the_model_sees_trained_timesteps_and_no_gradient(short: Schedule) -> None:
    seen: list[list[int]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(t.tolist())
        return stand_in_model(x, t)

    sample(model, torch.zeros(2, 4, 8, 8), short, "ddim")
    assert seen == [[t, t] for t in short.timestep_map[::-1]]


@pytest.mark.parametrize(
    ("method", "eta", "expected"),
    [("ancestral", 0.0, [0, 1, 2, 3]), ("ddim", 0.5, [0, 1, 2, 3]), ("ddim", 0.0, [])],
)
def test_noise_is_asked_for_where_it_is_used(short: Schedule, method: str, eta: float, expected: list[int]) -> None:
    asked: list[int] = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return torch.ones(1, 4, 8, 8)

    sample(stand_in_model, torch.zeros(1, 4, 8, 8), short, method, noise=noise, eta=eta)  # type: ignore[arg-type]
    assert asked == expected


def test_progress_counts_every_step(short: Schedule) -> None:
    calls: list[tuple[int, int]] = []
    sample(stand_in_model, torch.zeros(1, 4, 8, 8), short, "ddim", progress=lambda *step: calls.append(step))
    assert calls == [(done, 5) for done in range(1, 6)]


def test_ddim_recovers_the_data_when_the_noise_is_known(short: Schedule) -> None:
    x_start, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    c = short.at(4)
    initial = c.signal_scale * x_start + c.noise_scale * noise
    recovered = sample(lambda x, t: torch.cat([noise, noise], dim=1), initial, short, "ddim")
    torch.testing.assert_close(recovered, x_start, rtol=0, atol=1e-3)  # the start holds 0.6 % of the data


def test_ddim_with_eta_one_has_the_variance_of_the_posterior(short: Schedule) -> None:
    """Song 2021, eq. 16, written out."""
    for index in range(5):
        ab, ab_prev = short.alphas_cumprod[index], short.alphas_cumprod_prev[index]
        expected = np.sqrt((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev))
        assert ddim_sigma(short, index, 1.0) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [0, 1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_sampling_steps is {steps}.*2 to 1000"):
        respace(linear_schedule(), steps)


def test_a_schedule_whose_betas_reach_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_timesteps is 20: .* more than 20"):
        linear_schedule(20)
    assert linear_schedule(21).betas.max() < 1


def test_sampling_refuses_what_it_cannot_do(short: Schedule) -> None:
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="unknown sampling method 'euler'"):
        sample(stand_in_model, x, short, "euler")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"eta is 1\.5"):
        sample(stand_in_model, x, short, "ddim", eta=1.5)
    with pytest.raises(ValueError, match=r"eta is 0\.5 with method 'ancestral'"):
        sample(stand_in_model, x, short, eta=0.5, noise=torch.ones_like)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs noise at each step"):
        sample(stand_in_model, x, short)
    with pytest.raises(ValueError, match=r"need 8 channels.*create_model\(NAME, latent_channels=4\)"):
        sample(lambda x, t: x, x, short, "ddim")

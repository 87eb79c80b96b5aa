"""The training losses and the samplers of timesteps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edt_core.diffusion import (
    LossSecondMomentSampler,
    UniformSampler,
    linear_schedule,
    objective_of,
)
from edt_core.diffusion.gaussian import Epsilon
from edt_core.diffusion.timesteps import draw_timesteps

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "diffusion.npz")
SCHEDULE = linear_schedule()
EPSILON = objective_of("epsilon")


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[f"train.{name}"])


def golden_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return golden("x_start"), golden("x_t"), golden("noise"), golden("t")


def test_losses_meet_the_reference() -> None:
    x_start, x_t, noise, t = golden_inputs()
    torch.testing.assert_close(EPSILON.noised(SCHEDULE, x_start, t, noise), x_t, rtol=1e-6, atol=1e-6)
    losses = EPSILON.losses(SCHEDULE, golden("model_output"), *golden_inputs())
    for name, value in {**losses.terms, "loss": losses.loss}.items():
        torch.testing.assert_close(value, golden(name), rtol=1e-5, atol=0)


def test_a_sample_has_the_same_loss_in_any_batch() -> None:
    whole = EPSILON.losses(SCHEDULE, golden("model_output"), *golden_inputs()).loss
    alone = [
        EPSILON.losses(SCHEDULE, golden("model_output")[i : i + 1], *(v[i : i + 1] for v in golden_inputs())).loss
        for i in range(len(whole))
    ]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-6, atol=0)


def test_the_bound_trains_the_variance_and_the_squared_error_the_noise() -> None:
    output = golden("model_output").requires_grad_()
    losses = EPSILON.losses(SCHEDULE, output, *golden_inputs())
    (from_bound,) = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
    (from_mse,) = torch.autograd.grad(losses["mse"].sum(), output)
    assert torch.count_nonzero(from_bound[:, :4]) == 0
    assert torch.count_nonzero(from_mse[:, 4:]) == 0
    assert torch.isfinite(from_bound).all()
    assert torch.count_nonzero(from_bound[:, 4:]) > 0
    assert torch.count_nonzero(from_mse[:, :4]) == from_mse[:, :4].numel()


def test_the_true_noise_has_no_squared_error_and_the_posterior_variance_no_bound() -> None:
    x_start, x_t, noise, t = golden_inputs()
    output = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)
    losses = EPSILON.losses(SCHEDULE, output, x_start, x_t, noise, t)
    assert torch.count_nonzero(losses["mse"]) == 0
    torch.testing.assert_close(losses["vb"][t > 0], torch.zeros(5), rtol=0, atol=1e-5)


def test_losses_are_float32_under_autocast_and_for_a_half_precision_output() -> None:
    rounded = golden("model_output").bfloat16()
    plain = EPSILON.losses(SCHEDULE, rounded.float(), *golden_inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = EPSILON.losses(SCHEDULE, rounded, *golden_inputs())
    assert cast.loss.dtype == torch.float32
    assert torch.equal(cast.loss, plain.loss)


def test_min_snr_weight_caps_easy_timesteps_only() -> None:
    snr = torch.tensor([0.01, 5.0, 10.0, 500.0])
    torch.testing.assert_close(Epsilon().min_snr_weight(snr, 5.0), torch.tensor([1.0, 1.0, 0.5, 0.01]))
    unweighted = EPSILON.losses(SCHEDULE, golden("model_output"), *golden_inputs(), min_snr_gamma=None)["mse"]
    expected = (golden("noise") - golden("model_output")[:, :4]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(unweighted, expected)


def test_losses_refuse_shapes_that_do_not_fit() -> None:
    x_start, x_t, noise, t = golden_inputs()
    with pytest.raises(ValueError, match=r"\(6, 4, 8, 8\).*need 8 channels"):
        EPSILON.losses(SCHEDULE, noise, x_start, x_t, noise, t)
    with pytest.raises(ValueError, match=r"noise \(3, 4, 8, 8\)"):
        EPSILON.losses(SCHEDULE, golden("model_output"), x_start, x_t, noise[:3], t)


def warmed_sampler(rounds: int = 13) -> LossSecondMomentSampler:
    sampler = LossSecondMomentSampler(20)
    for losses in GOLDEN["resampler.losses"][:rounds]:
        sampler.update(np.arange(20), losses)
    return sampler


@pytest.mark.parametrize("rounds", [9, 10, 13])
def test_second_moment_weights_meet_the_reference(rounds: int) -> None:
    weights = warmed_sampler(rounds).weights()
    np.testing.assert_allclose(weights, GOLDEN[f"resampler.weights_after_{rounds}"], rtol=1e-12)


def test_one_update_with_repeated_timesteps_equals_many() -> None:
    together = LossSecondMomentSampler(20)
    together.update(np.tile(np.arange(20), 13), GOLDEN["resampler.losses"].ravel())
    np.testing.assert_array_equal(together.weights(), warmed_sampler().weights())


def test_draws_follow_the_weights_and_stay_unbiased() -> None:
    weights = warmed_sampler().weights()
    uniforms = (np.arange(200_000) + 0.5) / 200_000
    timesteps, importance = draw_timesteps(weights, uniforms)
    np.testing.assert_allclose(np.bincount(timesteps, minlength=20) / 200_000, weights, atol=1e-5)
    # an importance-weighted mean over the draws is the plain mean over the timesteps
    values = np.linspace(1.0, 3.0, 20)
    assert np.mean(values[timesteps] * importance) == pytest.approx(values.mean(), rel=1e-3)


def test_draws_reach_both_ends_and_nothing_of_probability_zero() -> None:
    ends = [0.0, np.nextafter(1.0, 0.0)]
    np.testing.assert_array_equal(UniformSampler(1000).draw(ends).timesteps, [0, 999])
    np.testing.assert_array_equal(draw_timesteps(np.array([0.0, 1.0, 0.0]), ends).timesteps, [1, 1])


def test_uniform_draws_weigh_one() -> None:
    draw = UniformSampler(1000).draw(np.random.default_rng(0).random(64))
    assert draw.timesteps.dtype == np.int64
    np.testing.assert_array_equal(draw.weights, np.ones(64, dtype=np.float32))


def test_a_timestep_more_frequent_than_its_places_keeps_its_last_losses() -> None:
    sampler = LossSecondMomentSampler(30, history=3)
    timesteps = np.random.default_rng(0).integers(0, 4, 200)  # each about 50 times, in any order
    losses = np.random.default_rng(1).random(200)
    sampler.update(timesteps[:7], losses[:7])
    sampler.update(timesteps[7:], losses[7:])
    rings, counts = np.zeros((30, 3)), np.zeros(30, int)
    for timestep, loss in zip(timesteps, losses, strict=True):
        rings[timestep, counts[timestep] % 3] = loss
        counts[timestep] += 1
    state = sampler.state_dict()
    assert np.array_equal(state["losses"], rings)
    assert np.array_equal(state["counts"], counts)


def test_losses_of_zero_leave_the_sampler_uniform() -> None:
    sampler = LossSecondMomentSampler(4, history=1)
    sampler.update(np.arange(4), np.zeros(4))
    np.testing.assert_array_equal(sampler.weights(), np.ones(4))


def test_a_restored_sampler_goes_on_as_the_uninterrupted_one() -> None:
    uninterrupted, saved = warmed_sampler(7), warmed_sampler(7).state_dict()
    restored = LossSecondMomentSampler(20)
    restored.load_state_dict(saved)
    for step in range(12):
        uniforms = np.random.default_rng(step).random(64)
        expected, actual = uninterrupted.draw(uniforms), restored.draw(uniforms)
        np.testing.assert_array_equal(actual.timesteps, expected.timesteps)
        np.testing.assert_array_equal(actual.weights, expected.weights)
        for sampler in (uninterrupted, restored):
            sampler.update(expected.timesteps, np.cos(expected.timesteps) + 2)
    np.testing.assert_array_equal(saved["counts"], np.full(20, 7))  # the saved state is a copy


def test_a_state_of_another_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(20, 10\).*\(30, 10\)"):
        LossSecondMomentSampler(30).load_state_dict(warmed_sampler().state_dict())
    with pytest.raises(ValueError, match="uniform sampler has none"):
        UniformSampler(20).load_state_dict(warmed_sampler().state_dict())
    with pytest.raises(ValueError, match=r"has arrays \{\}"):
        LossSecondMomentSampler(20).load_state_dict(UniformSampler(20).state_dict())


@pytest.mark.parametrize(
    ("timesteps", "losses", "message"),
    [
        ([1, 2], [0.5], "global batch"),
        ([1, 20], [0.5, 0.5], "from 1 to 20.*0 to 19"),
        ([-1, 2], [0.5, 0.5], "from -1 to 2"),
        ([1, 2, 3], [0.5, np.nan, np.inf], "2 of 3 losses are not finite"),
    ],
)
def test_a_refused_update_changes_nothing(timesteps: list[int], losses: list[float], message: str) -> None:
    sampler = warmed_sampler()
    before = sampler.state_dict()
    with pytest.raises(ValueError, match=message):
        sampler.update(timesteps, losses)
    for name, array in sampler.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("uniforms", [[1.0], [-0.1], [np.nan], [[0.5]]])
def test_uniforms_outside_their_range_are_refused(uniforms: list[float]) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        UniformSampler(10).draw(uniforms)

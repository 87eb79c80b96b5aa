"""Guidance, and the noise of evaluation."""

import threading
from functools import partial

import pytest
import torch
from torch import Tensor

from edt_core import diffusion
from edt_core.diffusion import SampleNoise, guided, linear_schedule, objective_of, respace, sample_noise
from edt_core.diffusion.guidance import power_cosine_scale

NULL = 10
sample = partial(diffusion.sample, objective=objective_of("epsilon"))


class RecordingModel:
    """Predicts its labels everywhere, and remembers the labels of each call."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert len(x) == len(t) == len(y)
        self.calls.append(y.tolist())
        return y.float()[:, None, None, None].expand(-1, 8, *x.shape[2:]) + torch.cat([x, x], dim=1)


X = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
T = torch.tensor([5, 5])
Y = torch.tensor([1, 2])


def test_cfg_one_calls_the_model_once_with_the_labels_alone() -> None:
    model = RecordingModel()
    output = guided(model, Y, NULL, 1.0)(X, T)
    assert model.calls == [[1, 2]]
    assert torch.equal(output, RecordingModel()(X, T, Y))


@pytest.mark.parametrize(("channels", "guided_channels"), [(3, 3), (1, 1), (None, 4)])
def test_guidance_moves_the_chosen_channels_in_one_call(channels: int | None, guided_channels: int) -> None:
    model = RecordingModel()
    output = guided(model, Y, NULL, 4.0, channels)(X, T)
    assert model.calls == [[1, 2, NULL, NULL]]
    conditional, unconditional = model(X, T, Y), model(X, T, torch.full_like(Y, NULL))
    expected = conditional.clone()
    expected[:, :guided_channels] += 3.0 * (conditional - unconditional)[:, :guided_channels]
    torch.testing.assert_close(output, expected)


def test_cfg_zero_is_the_unconditional_noise() -> None:
    output = guided(RecordingModel(), Y, NULL, 0.0, channels=None)(X, T)
    torch.testing.assert_close(output[:, :4], X + NULL)


def test_a_growing_scale_is_one_at_the_noise_and_whole_at_the_image() -> None:
    scales = power_cosine_scale(4.0, torch.tensor([0.0, 0.001, 0.5, 1.0]), 4.0)
    # 1 + 3 (1 - cos(pi / 16)) / 2 in the middle of the chain
    torch.testing.assert_close(scales, torch.tensor([1.0, 1.0, 1.0288, 4.0]), atol=1e-4, rtol=0)


def test_each_sample_has_the_scale_of_its_timestep() -> None:
    t = torch.tensor([0, 1000])
    both = guided(RecordingModel(), Y, NULL, 4.0, growth=(4.0, lambda t: 1 - t / 1000))(X, t)
    torch.testing.assert_close(both[:1], guided(RecordingModel(), Y[:1], NULL, 4.0)(X[:1], t[:1]))
    torch.testing.assert_close(both[1:], RecordingModel()(X[1:], t[1:], Y[1:]))


def test_guidance_on_impossible_channels_is_refused() -> None:
    with pytest.raises(ValueError, match="guidance on 0 channels"):
        guided(RecordingModel(), Y, NULL, 2.0, channels=0)
    with pytest.raises(ValueError, match="5 channels, but the latents have 4"):
        guided(RecordingModel(), Y, NULL, 2.0, channels=5)(X, T)


def test_noise_does_not_depend_on_the_batch() -> None:
    whole = SampleNoise(7, range(10), (4, 8, 8))
    for batch in ([3], [9, 0, 3], [2, 3, 4, 5]):
        part = SampleNoise(7, batch, (4, 8, 8))
        assert torch.equal(part.initial(), whole.initial()[batch])
        assert torch.equal(part(17), whole(17)[batch])


def test_noise_does_not_depend_on_the_order_of_calls() -> None:
    first, second = SampleNoise(7, [3, 4], (4, 8, 8)), SampleNoise(7, [3, 4], (4, 8, 8))
    late, early = first(9), first(0)
    assert torch.equal(second(0), early)
    assert torch.equal(second(9), late)
    assert torch.equal(second.initial(), sample_noise(7, [3, 4], (4, 8, 8)))


def test_noise_differs_by_seed_sample_and_step() -> None:
    seeds = [7, 7 + 2**32, 7 + 2**64]  # a 32-bit generator would take these for one
    draws = [sample_noise(s, [i], (64,), d) for s in seeds for i in (0, 1) for d in (0, 1, 2)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_noise_is_standard_normal() -> None:
    noise = sample_noise(0, range(64), (4, 16, 16))
    assert noise.dtype == torch.float32
    assert noise.mean().abs() < 0.02
    assert (noise.std() - 1).abs() < 0.02


def test_noise_is_fixed_for_good() -> None:
    """Kept samples and reported metrics hang on these values: changing them changes every evaluation."""
    torch.testing.assert_close(
        sample_noise(0, [0], (3,)), torch.tensor([[0.0259798, -1.0800595, -1.7306075]]), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        sample_noise(5, [41], (3,), 2),
        torch.tensor([[-0.1315942, -1.2738549, -1.0249615]]),
        rtol=0,
        atol=1e-6,
    )


def test_negative_indices_are_refused() -> None:
    with pytest.raises(ValueError, match="indices from -1"):
        sample_noise(0, [2, -1], (3,))


def test_a_sample_is_the_same_in_any_batch() -> None:
    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        label = (y / 10)[:, None, None, None]
        return torch.cat([0.5 * x + label, torch.tanh(x)], dim=1)

    def run(indices: list[int]) -> Tensor:
        noise = SampleNoise(3, indices, (4, 4, 4))
        model_fn = guided(model, torch.tensor(indices), NULL, 1.5)
        return sample(model_fn, noise.initial(), respace(linear_schedule(), 6), noise=noise)

    torch.testing.assert_close(run([2, 5, 8])[1], run([5])[0])


class Chain:
    """Runs guided models over the timesteps 999, 500 and 0, and keeps what each step gave."""

    def __init__(self, **options: object) -> None:
        self.model, self.calls = RecordingModel(), []
        model_fn = guided(self.model, Y, NULL, 4.0, **options)  # type: ignore[arg-type]
        schedule = respace(linear_schedule(), 3)
        self.timesteps = schedule.timestep_map[::-1].tolist()
        self.x_0 = sample(model_fn, X, schedule, "ddim")


def test_outside_the_interval_the_model_is_called_with_the_labels_alone() -> None:
    both, one = [1, 2, NULL, NULL], [1, 2]
    assert Chain().model.calls == [both] * 3
    assert Chain(interval=(500, 999)).timesteps == [999, 500, 0]
    assert Chain(interval=(500, 999)).model.calls == [one, both, one]  # from is inside, to is not
    assert Chain(interval=(0, 1)).model.calls == [one, one, both]
    assert Chain(interval=(600.5, 700)).model.calls == [one] * 3


def test_an_interval_of_everything_is_guidance_and_one_of_nothing_is_none() -> None:
    assert torch.equal(Chain(interval=(0, 1000)).x_0, Chain().x_0)
    plain = sample(guided(RecordingModel(), Y, NULL, 1.0), X, respace(linear_schedule(), 3), "ddim")
    assert torch.equal(Chain(interval=(1000, 2000)).x_0, plain)
    with pytest.raises(ValueError, match=r"interval \[5, 5\] has no effect"):
        Chain(interval=(5, 5))


def test_a_guide_takes_the_place_of_the_null_label() -> None:
    model, guide = RecordingModel(), RecordingModel()
    output = guided(model, Y, NULL, 3.0, 2, guide=lambda x, t, y: 0.5 * guide(x, t, y))(X, T)  # type: ignore[operator]
    assert model.calls == guide.calls == [[1, 2]]
    strong = RecordingModel()(X, T, Y)
    expected = torch.cat([0.5 * strong[:, :2] + 3.0 * 0.5 * strong[:, :2], strong[:, 2:]], dim=1)
    torch.testing.assert_close(output, expected)


def test_a_guide_is_not_called_outside_the_interval_nor_without_guidance() -> None:
    guide = RecordingModel()
    chain = Chain(guide=guide, interval=(500, 600))
    assert chain.model.calls == [[1, 2]] * 3
    assert guide.calls == [[1, 2]]
    guided(RecordingModel(), Y, NULL, 1.0, guide=guide)(X, T)  # type: ignore[operator]
    assert guide.calls == [[1, 2]]


def test_noise_made_ahead_is_the_same_noise() -> None:
    noise = SampleNoise(7, [3, 1], (4, 8, 8))
    for depth in (0, 1, 3):
        with noise.ahead(5, depth) as coming:
            assert all(torch.equal(coming(step), noise(step)) for step in range(5))


def test_noise_made_ahead_comes_in_order() -> None:
    noise = SampleNoise(7, [3], (2,))
    with (
        noise.ahead(2) as coming,
        pytest.raises(ValueError, match=r"step 1 requested, but step 0 is next.*0\.\.1 in order"),
    ):
        coming(1)
    with noise.ahead(1) as coming:
        coming(0)
        with pytest.raises(ValueError, match="step 1 requested, but step None is next"):
            coming(1)


def test_leaving_ends_the_thread_that_makes_noise() -> None:
    before = threading.active_count()

    def interrupted() -> None:
        with SampleNoise(7, [3], (2,)).ahead(1000) as coming:
            coming(0)
            assert threading.active_count() == before + 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert threading.active_count() == before

"""Power-function averages: their profiles, what a mixture of them misses, and averages of real trajectories."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.store.artifact import ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.training.ema import EMA
from edt_core.training.posthoc.profile import Average, exponent, inner_products, mixture, rate
from edt_core.training.posthoc.snapshots import Snapshot, SnapshotStore, reconstructed

ROUNDING = 2.0**-8  # of bfloat16, relative


def profile(average: Average, times: np.ndarray) -> np.ndarray:
    g = exponent(average.width)
    return np.where(times <= average.step, (g + 1) * times**g / average.step ** (g + 1), 0.0)


def grid(number: int, steps: int, widths: Sequence[float] = (0.05, 0.1)) -> list[Average]:
    return [Average(steps * place // number, width) for place in range(1, number + 1) for width in widths]


def test_exponents_are_those_of_the_paper_s_widths() -> None:
    """And a width is the standard deviation of its profile: eq. 123 of arXiv 2312.02696."""
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)
    times = (np.arange(200_000) + 0.5) / 200_000
    for width in (0.01, 0.025, 0.05, 0.1, 0.2, 0.28):
        weights = profile(Average(1, width), times) / len(times)
        mean = (weights * times).sum()
        assert weights.sum() == pytest.approx(1, rel=1e-4)
        assert np.sqrt((weights * (times - mean) ** 2).sum()) == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.29, 1.0, float("nan")])
def test_a_width_that_no_average_has_is_refused(width: float) -> None:
    with pytest.raises(UserError, match=r"above 0 and at most 0\.28"):
        exponent(width)


def test_rates_give_the_profile() -> None:
    """The average of a quantity that is i at step i is the mean of the profile: (g + 1) / (g + 2) of the training."""
    for width in (0.05, 0.1):
        average, g = 123.0, exponent(width)  # the value before the first step does not count
        for step in range(1, 5001):
            average += rate(g, step) * (step - average)
        assert average / 5000 == pytest.approx((g + 1) / (g + 2), rel=2e-4)


def test_inner_products_are_integrals() -> None:
    averages = [Average(1, 0.05), Average(2, 0.1), Average(2, 0.25)]
    times = (np.arange(400_000) + 0.5) / 200_000
    profiles = np.stack([profile(average, times) for average in averages])
    expected = profiles @ profiles.T / 200_000
    assert np.allclose(inner_products(averages, averages), expected, rtol=1e-4)
    assert np.array_equal(inner_products(averages[:1], averages), inner_products(averages, averages)[:1])


@pytest.mark.parametrize(("width", "error"), [(0.07, 0.009), (0.15, 0.022), (0.03, 0.08)])
def test_ten_snapshots_of_two_widths_give_a_third(width: float, error: float) -> None:
    found = mixture(grid(10, 400_000), Average(400_000, width))
    assert found.error == pytest.approx(error, rel=0.06)
    assert found.coefficients.sum() == pytest.approx(1, abs=1e-12)
    assert mixture(grid(20, 400_000), Average(400_000, width)).error < found.error / 2


def test_a_mixture_s_error_is_that_of_its_profile() -> None:
    averages, wanted = grid(10, 1000), Average(1000, 0.15)
    found = mixture(averages, wanted)
    times = np.arange(0.005, 1000, 0.01)
    mixed = found.coefficients @ np.stack([profile(average, times) for average in averages])
    target = profile(wanted, times)
    assert found.error == pytest.approx(np.linalg.norm(mixed - target) / np.linalg.norm(target), rel=1e-3)


def test_an_average_that_is_among_the_snapshots_is_itself() -> None:
    found = mixture(grid(20, 400_000), Average(400_000, 0.1))
    assert found.error < 1e-6
    assert np.allclose(found.coefficients, [0.0] * 39 + [1.0], atol=1e-7)


class Walk(torch.nn.Module):
    """Weights that move at random, a frozen parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(300))
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("constant", torch.arange(3.0))


def test_an_average_from_snapshots_is_the_tracked_one_within_the_stated_error(tmp_path: Path) -> None:
    """By Cauchy and Schwarz: the distance of the profiles times that of the weights from their mean."""
    steps, tracked, others = 400, (0.05, 0.1), (0.03, 0.07, 0.15)
    model, generator = Walk(), torch.Generator().manual_seed(0)
    ema = EMA(model, (0.9,), widths=(*tracked, *others))
    store = SnapshotStore(ArtifactWriter(Folder.at(tmp_path), "checkpoint", "0" * 64))
    path = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight += torch.randn(300, generator=generator) * 0.1 + 0.01
        path.append(model.weight.detach().double().clone())
        ema.update(step=step)
        if step % 20 == 0:
            store.write(Snapshot.of(step, TrainConfig(ema_widths=tracked), ema.of_widths[:2]))
    assert store.whole(tracked) == set(range(20, 401, 20))
    assert all(average.keys() == {"weight"} for average in ema.of_widths), "the others are those of the model"
    assert ema.averages[0].keys() == {"weight", "frozen", "constant"}
    averages = grid(20, steps)
    files = [tmp_path / f"snapshots/step-{each.step:08d}/ema-width-{each.width}.safetensors" for each in averages]
    way = torch.stack(path)
    spread = (way - way.mean(0)).norm(dim=0)
    for width, expected in zip((*tracked, *others), ema.of_widths, strict=True):
        parts = mixture(averages, Average(steps, width))
        made = reconstructed(zip(parts.coefficients, files, strict=True))["weight"]
        wanted = [Average(steps, width)]
        bound = parts.error * float(inner_products(wanted, wanted)[0, 0]) ** 0.5 * spread
        rounding = 5 * float(np.linalg.norm(parts.coefficients)) * ROUNDING * way.abs().max()
        distance = (made.double() - expected["weight"].double()).abs()
        assert bool((distance <= bound + rounding).all()), width
        if width in tracked:
            exact = expected["weight"]
            assert bool((distance <= ROUNDING * exact.abs() + 1e-6).all()), "up to bfloat16"
        else:
            nearest = ema.of_widths[0 if width < 0.06 else 1]["weight"]
            assert distance.norm() < 0.2 * (nearest - expected["weight"]).norm(), "nearer than any snapshot"

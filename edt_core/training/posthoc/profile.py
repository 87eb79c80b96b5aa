"""Power-function averages and their mixtures (Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C).

The average at step T with exponent g weighs the weights of step t by its profile, (g + 1) t^g / T^(g + 1). Its width is
the standard deviation of t / T. A mixture of averages with other steps and widths has the mixture of their profiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edt_core.errors import UserError

MAX_WIDTH = 0.28  # the uniform average, of exponent 0, has a width of 1 / sqrt(12) = 0.2887


@dataclass(frozen=True)
class Average:
    """A power-function average: the number of steps that it is taken after, and its width."""

    step: int
    width: float


@dataclass(frozen=True)
class Mixture:
    """Coefficients float64 [n] of averages, with a sum of 1, that approximate another average.

    `error` is the distance of its profile from the one wanted, relative to the norm of that.
    """

    coefficients: NDArray[np.float64]
    error: float


def exponent(width: float) -> float:
    """The exponent g of an average of this width: the largest root of a cubic (eq. 126).

    Raises UserError for a width that is not above 0 and at most 0.28.
    """
    if not 0 < width <= MAX_WIDTH:
        raise UserError(
            f"a power-function average has a width above 0 and at most {MAX_WIDTH}, as a share of the training; got "
            f"{width:g}"
        )
    inverse = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def rate(exponent: float, step: int) -> float:
    """The share of the newest weights in the update after `step` steps, counted from 1 (eq. 127).

    It is 1 - (1 - 1/t)^(g + 1), so 1 at the first step: the initial weights do not count.
    """
    return 1.0 - (1.0 - 1.0 / step) ** (exponent + 1.0)


def inner_products(first: Sequence[Average], second: Sequence[Average]) -> NDArray[np.float64]:
    """The integrals over t of the products of two profiles each, float64 [len(first), len(second)] (eq. 151)."""
    steps, exponents = _columns(first)
    other_steps, other_exponents = _columns(second)
    a, b = exponents[:, None], other_exponents
    ratio = steps[:, None] / other_steps
    scale = (a + 1) * (b + 1) / ((a + b + 1) * np.maximum(steps[:, None], other_steps))
    products: NDArray[np.float64] = scale * ratio ** np.where(ratio < 1, b, -a)
    return products


def _columns(averages: Sequence[Average]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    steps = np.array([average.step for average in averages], np.float64)
    return steps, np.array([exponent(average.width) for average in averages], np.float64)


def mixture(averages: Sequence[Average], wanted: Average) -> Mixture:
    """The mixture of averages whose profile is nearest to another one's (algorithm 3), by least squares in float64.

    The coefficients are scaled to a sum of 1: an error of the sum would scale the weights.
    """
    products, target = inner_products(averages, averages), inner_products(averages, [wanted])[:, 0]
    solution = np.linalg.lstsq(products, target, rcond=None)[0]
    coefficients = solution / solution.sum()
    norm = float(inner_products([wanted], [wanted])[0, 0])
    distance = coefficients @ products @ coefficients - 2 * coefficients @ target + norm
    return Mixture(coefficients, float(np.sqrt(max(distance, 0.0) / norm)))

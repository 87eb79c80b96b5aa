"""Metrics at the sizes of a published evaluation: Fréchet distance against scipy's, and the cost of all pairs."""

import json
import subprocess
import sys
import time

import numpy as np
from numpy.typing import NDArray

from edt_core.child_process import child_environment, python_command
from edt_core.evaluation.metrics import Gaussian, frechet_distance, kernel_distance, precision_recall
from edt_core.evaluation.metrics.statistics import FeatureStatistics
from edt_core.memory import peak_bytes
from edt_core.printing.console import say
from jobs.benchmark.table import Row, mib, timed

GENERATED, REFERENCE, DIMENSIONS = 50_000, 10_000, 2048
_MEMORY_TARGET = "within 4,096 MiB"


def bench_metrics(scale: float = 1.0) -> list[Row]:
    """Time of the Fréchet distance against scipy.linalg.sqrtm, time and peak memory of precision, recall and kid.

    `scale` below 1 takes that share of the samples and of the dimensions.
    """
    generated, reference, dimensions = (
        max(least, int(size * scale)) for size, least in ((GENERATED, 64), (REFERENCE, 64), (DIMENSIONS, 16))
    )
    sizes = f"{generated:,} x {reference:,} in {dimensions:,} dimensions"
    rows = []
    for metric, name in (("precision_recall", "precision and recall"), ("kid", "kid")):
        seconds, processor_s, peak = _in_a_fresh_process(metric, generated, reference, dimensions)
        rows.append(Row(f"{name}, {sizes}", f"{seconds:,.1f} s, {processor_s:,.1f} s of processor time"))
        rows.append(Row(f"{name}, {sizes}, memory", mib(peak), "", None, _MEMORY_TARGET))
    return [*_bench_frechet(dimensions), *rows]


def _bench_frechet(dimensions: int) -> list[Row]:
    """Our distance and the one by the matrix square root, of the same two Gaussians."""
    first, second = (_made_gaussian(seed, dimensions) for seed in (0, 1))
    ours_s: list[float] = []
    sqrtm_s: list[float] = []
    for _ in range(2):  # the better of two: the first use of a library takes longer
        with timed(ours_s):
            ours = frechet_distance(first, second)
        with timed(sqrtm_s):
            theirs = _frechet_by_sqrtm(first, second)
    what = f"Fréchet distance in {dimensions:,} dimensions"
    against = f"by scipy.linalg.sqrtm {min(sqrtm_s):.2f} s"
    return [
        Row(what, f"{min(ours_s):.2f} s", against, min(sqrtm_s) / min(ours_s), "at least 3"),
        Row(f"{what}, relative difference of the two", f"{abs(ours - theirs) / theirs:.0e}", "", None, "at most 1e-9"),
    ]


def _made_gaussian(seed: int, dimensions: int) -> Gaussian:
    """Statistics of correlated features whose variances fall over three orders of magnitude."""
    rng = np.random.default_rng(seed)
    spread = np.logspace(0, -1.5, dimensions)
    features = rng.standard_normal((3 * dimensions, dimensions)) * spread + rng.uniform(0, 0.1, dimensions)
    return FeatureStatistics.from_features(features @ _rotation(dimensions)).gaussian


def _rotation(dimensions: int) -> NDArray[np.float64]:
    return np.linalg.qr(np.random.default_rng(2).standard_normal((dimensions, dimensions)))[0]


def _frechet_by_sqrtm(first: Gaussian, second: Gaussian) -> float:
    """The formula of common implementations."""
    from scipy.linalg import sqrtm

    gap = first.mean - second.mean
    root = sqrtm(first.covariance @ second.covariance)
    return float(gap @ gap + np.trace(first.covariance) + np.trace(second.covariance) - 2 * np.trace(root).real)


def _in_a_fresh_process(metric: str, generated: int, reference: int, dimensions: int) -> tuple[float, float, int]:
    """Seconds, processor seconds, and the process's highest resident bytes, features and libraries included."""
    command = python_command("-m", "jobs.benchmark.metrics", metric, str(generated), str(reference), str(dimensions))
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=child_environment())
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    seconds, processor_s, peak = json.loads(done.stdout)
    return seconds, processor_s, peak


def _measure(metric: str, generated: int, reference: int, dimensions: int) -> tuple[float, float, int]:
    rng = np.random.default_rng(0)
    generated_features, real = (
        rng.standard_normal((number, dimensions), dtype=np.float32) for number in (generated, reference)
    )
    seconds: list[float] = []
    processor_s = time.process_time()
    with timed(seconds):
        (precision_recall if metric == "precision_recall" else kernel_distance)(generated_features, real)
    processor_s = time.process_time() - processor_s
    return seconds[0], processor_s, peak_bytes()


if __name__ == "__main__":
    say(json.dumps(_measure(sys.argv[1], *map(int, sys.argv[2:5]))))

"""CMMD against its formula and the authors' figures, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edt_core.errors import UserError
from edt_core.evaluation.extractors import EXTRACTORS, extractor_spec
from edt_core.evaluation.metrics import METRICS, compute_metrics, in_order, metric_name, metric_space, space_metrics
from edt_core.evaluation.metrics import cmmd as module
from edt_core.evaluation.metrics.cmmd import cmmd
from edt_core.evaluation.metrics.sample_size import bias_warning, shortfalls

Vectors = NDArray[np.float64]


def vectors(seed: int, number: int, dimensions: int, shift: float) -> Vectors:
    """Embeddings of length 1 around a direction that many share."""
    found = np.random.default_rng(seed).standard_normal((number, dimensions)) + shift
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def by_its_formula(x: Vectors, y: Vectors) -> float:
    """1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)), pair after pair, summed without loss."""

    def mean(a: Vectors, b: Vectors) -> float:
        kernels = [math.exp(-float(np.square(first - second).sum()) / (2 * 10**2)) for first in a for second in b]
        return math.fsum(kernels) / len(kernels)

    return 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


@pytest.mark.parametrize(("generated", "reference"), [(2, 2), (7, 5), (33, 40)])
@pytest.mark.parametrize("block_size", [1, 8, 2048])
def test_it_is_the_formula_in_blocks_of_any_size(generated: int, reference: int, block_size: int) -> None:
    x, y = vectors(0, generated, 12, 0.5), vectors(1, reference, 12, 0.6)
    expected = by_its_formula(x, y)
    assert expected > 0.1
    assert cmmd(x, y, block_size=block_size) == pytest.approx(expected, rel=1e-9)
    assert cmmd(y, x, block_size=block_size) == pytest.approx(expected, rel=1e-9)


# What `mmd` of sayakpaul/cmmd-pytorch (49fb717), the port of the authors' code, gave for these vectors in float64.
@pytest.mark.parametrize(
    ("sizes", "expected"), [((200, 150, 16), 0.15128753427506858), ((600, 500, 768), 0.07406077048766058)]
)
def test_it_is_what_the_authors_code_gives(sizes: tuple[int, int, int], expected: float) -> None:
    generated, reference, dimensions = sizes
    x, y = vectors(0, generated, dimensions, 0.5), vectors(1, reference, dimensions, 0.6)
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(expected, rel=1e-6)


def test_known_cases() -> None:
    x = vectors(0, 50, 8, 0.5)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-10)
    first, second = np.repeat([[1.0, 0.0]], 3, axis=0), np.repeat([[0.0, 1.0]], 4, axis=0)
    assert cmmd(first, second) == pytest.approx(2000 * (1 - math.exp(-2 / 200)), rel=1e-12)


def test_the_bias_is_as_its_docstring_says() -> None:
    """Two sets of one distribution: the mean over many is 1000 E[1 - k] (1/N + 1/M)."""
    number, other = 20, 30
    pairs = [(vectors(2 * i, number, 8, 0.5), vectors(2 * i + 1, other, 8, 0.5)) for i in range(300)]
    far = np.mean([1 - math.exp(-float(np.square(x[0] - y[0]).sum()) / 200) for x, y in pairs])
    values = [cmmd(x, y) for x, y in pairs]
    assert np.mean(values) == pytest.approx(1000 * far * (1 / number + 1 / other), rel=0.1)


def test_no_kernel_is_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    largest, plain = 0, module.squared_distances

    def watched(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, len(x), len(y))
        return plain(x, y)

    monkeypatch.setattr(module, "squared_distances", watched)
    cmmd(vectors(0, 50, 8, 0.5), vectors(1, 30, 8, 0.6), block_size=16)
    assert largest == 16


@pytest.mark.parametrize(
    ("generated", "reference", "message"),
    [
        (np.ones((1, 4)), np.ones((5, 4)), "1 generated features, but this metric needs at least 2"),
        (np.ones((5, 4)), np.ones((1, 4)), "1 reference features, but this metric needs at least 2"),
        (np.ones((5, 4)), np.ones((5, 3)), "4 dimensions, but the reference features have 3"),
        (np.full((5, 4), np.nan), np.ones((5, 4)), "5 of 5 generated features contain NaN"),
    ],
)
def test_what_cannot_be_compared_is_refused(generated: Vectors, reference: Vectors, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cmmd(generated, reference)
    with pytest.raises(UserError, match=message):
        compute_metrics(generated, reference, ("cmmd",), space="clip")


def test_its_name_is_that_of_its_space() -> None:
    x, y = vectors(0, 40, 6, 0.5), vectors(1, 30, 6, 0.6)
    values = compute_metrics(x, y, space="clip")
    assert list(values) == ["fd_clip", "kid_clip", "precision_clip", "recall_clip", "cmmd"]
    assert values["cmmd"] == cmmd(x, y)
    assert in_order(values) == ["fd_clip", "kid_clip", "precision_clip", "recall_clip", "cmmd"]
    assert (metric_name("cmmd", "clip"), metric_space("cmmd_std"), metric_space("fd_clip")) == ("cmmd", "clip", "clip")
    assert bias_warning(["cmmd"], 10) is None
    with pytest.raises(UserError, match="cmmd needs outputs of the CLIP network, which the space 'inception' does not"):
        compute_metrics(x, y, ("cmmd",))


def test_too_few_for_it_are_known_beforehand() -> None:
    found = list(shortfalls(("cmmd",), "clip", None, 100, 1, generated_kept=1, reference_kept=1))
    assert [(short.metric, short.side, short.have, short.need) for short in found] == [
        ("cmmd", "generated", 1, 2),
        ("cmmd", "reference", 1, 2),
    ]


def test_every_metric_belongs_to_a_space() -> None:
    assert set(METRICS) == {metric for space in EXTRACTORS for metric in space_metrics(space)}
    for space in EXTRACTORS:
        assert all(metric_space(metric_name(metric, space)) == space for metric in extractor_spec(space).metrics)

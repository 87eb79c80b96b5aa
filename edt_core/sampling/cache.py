"""Caches of features: most steps of a chain predict a model's features from the steps that compute everything.

Three kinds, for every family of models, sampler, guidance and attention modulation:

- taylor: the outputs of attention and feed-forward layers, before their gates, by a Taylor series whose derivatives are
  repeated differences (TaylorSeer, arXiv 2503.06923, eq. 3 to 5);
- newton: the same by Newton's interpolation through the last steps, which is exact for polynomials of the order;
- delta: the change of the tokens by each block, as it last was (residuals of Delta-DiT, arXiv 2406.01125).

Embeddings, adaptive norms, gates, the modules of EDT between stages, and the last layer are computed in every step.
Shapes: N rows of the batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from edt_core.models import shadow
from edt_core.models.attention import ResidualBlock

if TYPE_CHECKING:
    from edt_core.config import CacheConfig
    from edt_core.models import DiffusionTransformer, ModelConfig

Compute = Callable[[], Tensor]
_LOCKS: WeakKeyDictionary[nn.Module, Lock] = WeakKeyDictionary()  # of models with a cache
_REGISTER = Lock()


def is_full(call: int, cache: CacheConfig) -> bool:
    """Whether a call of the model computes everything; `call` counts from 0 at the last flush."""
    return call < cache.warmup or (call - cache.warmup + 1) % cache.interval == 0


def full_calls(calls: int, cache: CacheConfig | None) -> int:
    """How many of the first `calls` calls after a flush compute everything."""
    return calls if cache is None else sum(is_full(call, cache) for call in range(calls))


@dataclass
class Series:
    """A feature by the number of the call: its last value, and repeated differences of it over the calls between.

    `nodes`: calls with known values, the newest first; `terms[i]` is of degree i.
    """

    order: int
    newton: bool
    nodes: list[int] = field(default_factory=list)
    terms: list[Tensor] = field(default_factory=list)

    def add(self, call: int, value: Tensor) -> None:
        """Take a value that was computed, [N, T, D]."""
        before, nodes = self.terms, [call, *self.nodes]
        self.terms = [value]
        for degree in range(min(self.order, len(before))):
            # Taylor's term divides by the distance to the last node, Newton's to the node that leaves the difference.
            distance = call - nodes[degree + 1 if self.newton else 1]
            self.terms.append((self.terms[degree] - before[degree]) / distance)
        self.nodes = nodes[: self.order + 1]

    def at(self, call: int) -> Tensor:
        """The predicted value at a later call, [N, T, D]."""
        value, factor = self.terms[0], 1.0
        for degree, term in enumerate(self.terms[1:], start=1):
            factor *= (call - self.nodes[degree - 1]) if self.newton else (call - self.nodes[0]) / degree
            value = value + factor * term
        return value


@dataclass
class _Lane:
    """One sequence of calls: rows and labels of the last, its number since the last flush, and the features by it."""

    rows: int = 0
    call: int = -1
    labels: Tensor | None = None
    series: dict[tuple[int, str], Series] = field(default_factory=dict)


class FeatureCache:
    """The features of one model in one chain.

    `attached` to the model it is asked for each feature; `begin` says that a call of the model begins. The features are
    flushed when the number of rows changes, as where guidance begins or ends. Calls of another `lane`, which alternate
    with the others, have features of their own, and are flushed when their labels change. `calls` and `full` count the
    calls, and those that computed everything; `rows` the rows of both kinds of calls.

    It acts in the thread that attached it: calls by others compute everything. A second cache of the same model waits
    until the first is detached.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.calls = self.full = 0
        self.rows = {True: 0, False: 0}  # of calls that compute everything, and of the others
        self._thread = 0
        self._lanes: dict[str, _Lane] = {}
        self._lane = _Lane()

    @contextmanager
    def attached(self, model: DiffusionTransformer) -> Iterator[FeatureCache]:
        """Context in which the model asks this cache. Its features are freed at the end."""
        with _lock_of(model):
            yield from self._attached(model)

    def _attached(self, model: DiffusionTransformer) -> Iterator[FeatureCache]:
        blocks, self._thread = model.ordered_blocks(), get_ident()
        try:
            if self.config.kind == "delta":
                numbers = {id(block): number for number, block in enumerate(blocks)}
                model.predict_block = partial(self._block, numbers)
            else:
                for number, block in enumerate(blocks):
                    assert isinstance(block, ResidualBlock)
                    block.predict = partial(self._feature, number)
            yield self
        finally:
            model.predict_block = None
            for block in blocks:
                if isinstance(block, ResidualBlock):
                    block.predict = None
            self._lanes.clear()
            self._lane = _Lane()

    def begin(self, rows: int, lane: str = "", labels: Tensor | None = None) -> None:
        """A call of the model with this many rows begins; `labels` [N] of a lane in which they can change."""
        present = self._lane = self._lanes.setdefault(lane, _Lane())
        before = present.labels
        if rows != present.rows or (before is not None and labels is not None and not torch.equal(before, labels)):
            present.series.clear()
            present.rows, present.call = rows, -1
        present.labels = labels
        present.call += 1
        self.calls += 1
        full = is_full(present.call, self.config)
        self.full += full
        self.rows[full] += rows

    def _block(self, numbers: dict[int, int], block: nn.Module, x: Tensor, compute: Compute) -> Tensor:
        """The output of a block: the tokens and the change by it."""
        if id(block) not in numbers or get_ident() != self._thread:
            return compute()
        series = self._of(numbers[id(block)], "block")
        if not is_full(self._lane.call, self.config):
            return x + series.at(self._lane.call)
        out = compute()
        self._add(series, out - x)
        return out

    def _feature(self, block: int, name: str, compute: Compute) -> Tensor:
        """The output of a branch, computed or predicted."""
        if get_ident() != self._thread:
            return compute()
        series = self._of(block, name)
        if not is_full(self._lane.call, self.config):
            return series.at(self._lane.call)
        out = compute()
        self._add(series, out)
        return out

    def _add(self, series: Series, value: Tensor) -> None:
        if self.config.interval > 1:  # else nothing is predicted
            series.add(self._lane.call, value)

    def _of(self, block: int, name: str) -> Series:
        order = 0 if self.config.kind == "delta" else self.config.order
        return self._lane.series.setdefault((block, name), Series(order, self.config.kind == "newton"))


def _lock_of(model: DiffusionTransformer) -> Lock:
    """The lock of a model's caches. It is not kept in the model, which can be copied and pickled."""
    with _REGISTER:
        return _LOCKS.setdefault(model, Lock())


def call_macs(config: ModelConfig, cache: CacheConfig) -> tuple[int, int]:
    """Multiply-accumulates for one image of a call that computes everything, and of one that predicts.

    Counted as in `edt_core.models.cost`. Without any prediction the two are equal.
    """
    full, predicting = _macs_of_kind(config, cache.kind)
    return full, full if cache.interval == 1 else predicting


@lru_cache(maxsize=64)
def _macs_of_kind(config: ModelConfig, kind: Literal["taylor", "newton", "delta"]) -> tuple[int, int]:
    """The multiply-accumulates of `call_macs`, which depend on the kind alone."""
    from torch.utils.flop_counter import FlopCounterMode

    from edt_core.config import CacheConfig

    cache = CacheConfig(kind=kind, interval=2, order=0, warmup=1)
    model = shadow(config).eval()
    model.set_amm(())
    x = torch.empty(1, config.in_channels, config.latent_size, config.latent_size, device="meta")
    t, y = (torch.zeros(1, dtype=torch.int64, device="meta") for _ in range(2))
    counts = []
    with torch.no_grad(), FeatureCache(cache).attached(model) as features:
        for _ in range(2):
            features.begin(1)
            with FlopCounterMode(display=False) as counter:
                model(x, t, y)
            counts.append(counter.get_total_flops() // 2)
    return counts[0], counts[-1]


def mean_macs(config: ModelConfig, cache: CacheConfig, calls: int) -> float:
    """Multiply-accumulates for one image of a call, on average over this number of calls without a flush between."""
    full, predicting = call_macs(config, cache)
    count = full_calls(calls, cache)
    return (count * full + (calls - count) * predicting) / calls

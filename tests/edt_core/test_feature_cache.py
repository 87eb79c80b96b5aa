"""Caches of features: equal to the published code, exact where they predict nothing or polynomials, and counted."""

from contextlib import nullcontext
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edt_core.config import CacheConfig, ChainConfig
from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer, build_model, model_config
from edt_core.models.cost import macs_by_part
from edt_core.sampling.cache import FeatureCache, Series, call_macs, full_calls, is_full
from edt_core.sampling.sampler import LatentSampler
from tests.support.cases import suite_of
from tests.support.golden import GOLDEN, formula_weight, relative_error

FAMILIES = ("EDT-Tiny/2", "DiT-Tiny/2", "MDTv2-Tiny/2", "UViT-Tiny/2")


class Given:
    """A chain's start, and noise of its steps by their number."""

    def __init__(self, start: Tensor) -> None:
        self.start = start

    def initial(self) -> Tensor:
        return self.start

    def ahead(self, count: int) -> Any:
        draws = torch.randn(count, *self.start.shape, generator=torch.Generator().manual_seed(5))
        return nullcontext(lambda step: draws[step])


def formula_model(name: str, classes: int = 10) -> DiffusionTransformer:
    model = build_model(model_config(name, 32, classes)).eval()
    state = model.state_dict()
    model.load_state_dict(
        {k: v if k in ("pos_embed", "decoder_pos_embed") else formula_weight(k, v.shape) for k, v in state.items()}
    )
    return model


def sample(model: DiffusionTransformer, rows: int = 2, **chain: Any) -> tuple[Tensor, LatentSampler]:
    start = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    sampler = LatentSampler(model, ChainConfig(**chain), 1000)
    with torch.no_grad():
        return sampler.from_noise(list(range(rows)), Given(start), list(range(rows))), sampler


# --- against the published code


@pytest.mark.parametrize(
    ("interval", "order"), suite_of([(3, 1), (4, 4)], [(1, 0), (3, 1), (3, 3), (4, 4), (5, 2), (7, 0)])
)
def test_dit_equals_the_code_of_taylorseer(interval: int, order: int) -> None:
    """DDIM of 50 steps with guidance on three channels, which is what that code is right for."""
    golden = np.load(GOLDEN / "taylorseer.npz")
    cache = CacheConfig(kind="taylor", interval=interval, order=order)
    chain = ChainConfig(sampler="ddim", num_sampling_steps=50, cfg_scale=1.5, cache=cache)
    sampler = LatentSampler(formula_model("DiT-Tiny/2"), chain, 1000)
    with torch.no_grad():
        latents = sampler.from_noise(golden["y"], Given(torch.from_numpy(golden["noise"])), [0, 1, 2])
    assert relative_error(latents, golden[f"taylor_{interval}_{order}"]) < 1e-5


# --- the series


def test_newton_predicts_polynomials_exactly_and_taylor_only_lines() -> None:
    nodes, later = (0, 1, 4, 7, 10), 12

    def error(order: int, newton: bool, degree: int) -> float:
        series = Series(order, newton)
        for node in nodes:
            series.add(node, torch.tensor(float(node**degree), dtype=torch.float64))
        return abs(float(series.at(later)) - later**degree) / later**degree

    for order in range(5):
        for degree in range(order + 1):
            assert error(order, True, degree) < 1e-12
    assert error(1, False, 1) < 1e-12
    assert error(2, False, 2) > 0.01
    assert error(2, True, 3) > 0.01
    assert error(0, True, 1) > 0.01


def test_a_series_keeps_no_more_than_it_needs() -> None:
    series = Series(2, newton=True)
    for node in range(9):
        series.add(node, torch.ones(1))
        assert len(series.terms) == min(node + 1, 3)
        assert len(series.nodes) == min(node + 1, 3)


def test_full_calls_are_the_first_ones_and_then_every_interval() -> None:
    cache = CacheConfig(kind="taylor", interval=3, warmup=2)
    assert [call for call in range(12) if is_full(call, cache)] == [0, 1, 4, 7, 10]
    assert full_calls(12, cache) == 5
    assert full_calls(12, None) == 12
    assert full_calls(12, CacheConfig(kind="delta", interval=1)) == 12


# --- in a chain


KINDS = ("taylor", "newton", "delta")
KIND_OF_FAMILY = list(zip(FAMILIES, (*KINDS, "taylor"), strict=True))  # each of both


@pytest.mark.parametrize(("name", "kind"), suite_of(KIND_OF_FAMILY, product(FAMILIES, KINDS)))
def test_interval_1_gives_the_bits_without_a_cache(name: str, kind: str) -> None:
    model = formula_model(name)
    settings: dict[str, Any] = {"num_sampling_steps": 4, "cfg_scale": 1.5, "amm_blocks": (1,)}
    plain, _ = sample(model, **settings)
    cached, sampler = sample(model, **settings, cache={"kind": kind, "interval": 1})
    assert torch.equal(plain, cached)
    assert (sampler.caches[0].calls, sampler.caches[0].full) == (4, 4)


@pytest.mark.parametrize(("name", "kind"), suite_of(KIND_OF_FAMILY, product(FAMILIES, KINDS)))
def test_a_predicting_call_computes_no_block(name: str, kind: str) -> None:
    """Block calls are counted by hooks on the attention of each block, beside the cache's own counters."""
    model = formula_model(name)
    calls = [0] * model.config.num_blocks
    hooks = [
        attention.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
        for number, attention in enumerate(model.attentions())
    ]
    latents, sampler = sample(model, sampler="ddim", num_sampling_steps=10, cache={"kind": kind, "interval": 4})
    for hook in hooks:
        hook.remove()
    assert calls == [4] * len(calls)  # calls 0, 1, 5 and 9
    assert (sampler.caches[0].calls, sampler.caches[0].full) == (10, 4)
    plain, _ = sample(model, sampler="ddim", num_sampling_steps=10)
    assert not torch.equal(plain, latents)
    assert torch.isfinite(latents).all()
    assert all(block.predict is None for block in model.ordered_blocks())
    assert model.predict_block is None


def test_features_are_flushed_where_guidance_begins_and_ends() -> None:
    """Guided calls have twice the rows, so their features are others."""
    model = formula_model("EDT-Tiny/2")
    settings: dict[str, Any] = {"sampler": "ddim", "num_sampling_steps": 12, "cfg_scale": 2.0}
    _, sampler = sample(model, **settings, guidance_interval=(250, 750), cache={"kind": "taylor", "interval": 3})
    (cache,) = sampler.caches
    assert cache.calls == 12
    by_part = [full_calls(calls, sampler.chain.cache) for calls in (3, 6, 3)]
    assert cache.full == sum(by_part)


@pytest.mark.parametrize(
    ("objective", "sampler", "calls"),
    [
        ("epsilon", "ancestral", 8),
        ("v_prediction", "ddim", 8),
        ("epsilon", "dpmsolver++", 8),
        ("epsilon", "unipc", 8),
        ("flow", "euler", 8),
        ("flow", "heun", 16),
        ("flow", "sde", 8),
    ],
)
def test_every_kind_of_sampler_takes_it(objective: str, sampler: str, calls: int) -> None:
    from edt_core.diffusion import with_objective

    model = build_model(with_objective(model_config("EDT-Tiny/2", 32, 10), objective))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    latents, bound = sample(model, sampler=sampler, num_sampling_steps=8, cache={"kind": "newton", "interval": 2})
    assert bound.caches[0].calls == calls
    assert bound.caches[0].full < calls
    assert torch.isfinite(latents).all()


def test_a_smooth_chain_is_followed_closely() -> None:
    """With an untrained model's small weights the features change slowly; more full calls are closer."""
    model = build_model(model_config("DiT-Tiny/2", 32, 10))
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    plain, _ = sample(model, sampler="ddim", num_sampling_steps=20)
    errors = []
    for interval in (2, 4, 8):
        cached, _ = sample(
            model, sampler="ddim", num_sampling_steps=20, cache={"kind": "newton", "interval": interval, "order": 1}
        )
        errors.append(float((plain - cached).abs().max() / plain.abs().max()))
    assert errors[0] < errors[1] < errors[2] < 0.2


def test_a_guide_has_a_cache_of_its_own() -> None:
    model, guide = formula_model("EDT-Tiny/2"), formula_model("DiT-Tiny/2")
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    chain = ChainConfig(
        sampler="ddim", num_sampling_steps=6, cfg_scale=1.5, cache=CacheConfig(kind="taylor", interval=2)
    )
    sampler = LatentSampler(model, chain, 1000, guide)
    with torch.no_grad():
        sampler.from_noise([1], Given(start), [0])
    assert [(cache.calls, cache.full) for cache in sampler.caches] == [(6, full_calls(6, chain.cache))] * 2


def test_chains_in_other_threads_do_not_share_features() -> None:
    """Two chains with a cache take turns, and one without a cache computes everything beside them."""
    from concurrent.futures import ThreadPoolExecutor

    model = formula_model("EDT-Tiny/2")
    settings: dict[str, Any] = {"sampler": "ddim", "num_sampling_steps": 8}
    kinds: list[dict[str, Any]] = [{"cache": {"kind": "taylor", "interval": 3}}, {}, {"cache": {"kind": "delta"}}]
    alone = [sample(model, **settings, **kind)[0] for kind in kinds]
    with ThreadPoolExecutor(3) as threads:
        beside = list(threads.map(lambda kind: sample(model, **settings, **kind)[0], kinds * 2))
    for latents, expected in zip(beside, alone * 2, strict=True):
        assert relative_error(latents, expected.numpy()) < 1e-4


def test_an_error_within_a_chain_leaves_the_model_without_a_cache() -> None:
    model = formula_model("EDT-Tiny/2")
    with pytest.raises(RuntimeError, match="on purpose"), FeatureCache(CacheConfig(kind="taylor")).attached(model):
        raise RuntimeError("on purpose")
    assert all(block.predict is None for block in model.ordered_blocks())


# --- what it costs


@pytest.mark.parametrize("name", FAMILIES)
def test_a_predicting_call_costs_all_but_the_branches(name: str) -> None:
    config = model_config(name, 32, 10)
    full, predicting = call_macs(config, CacheConfig(kind="taylor", interval=2))
    parts = macs_by_part(config)
    assert full == sum(part.macs for part in parts)
    branches = sum(part.macs for part in parts if part.kind in ("attention", "feed-forward"))
    assert predicting == full - branches
    assert call_macs(config, CacheConfig(kind="taylor", interval=1)) == (full, full)
    assert call_macs(config, CacheConfig(kind="delta", interval=2))[1] < predicting


# --- in protocols


def test_a_protocol_keeps_it_and_older_ones_have_none() -> None:
    import json

    from edt_core.config import result_fields
    from edt_core.sampling.pipeline_options import call_chain, chain_config

    chain = ChainConfig(cache=CacheConfig(kind="newton", interval=4, order=1))
    assert chain_config(json.loads(json.dumps(chain.model_dump(mode="json")))) == chain
    assert result_fields(chain)["cache"] == {"kind": "newton", "interval": 4, "order": 1, "warmup": 2}
    assert "cache" not in result_fields(ChainConfig())  # so that older artifacts are reused
    assert call_chain({}, None, None, {"cache": {"kind": "delta"}}).cache == CacheConfig(kind="delta")
    with pytest.raises(UserError, match="option 'cache'"):
        call_chain({}, None, None, {"cache": {"kind": "other"}})


def test_a_sweep_names_caches_by_their_numbers() -> None:
    from edt_core.config import SampleConfig
    from jobs.commands.sweep import grid, parse_axis

    points = list(grid(SampleConfig(), [parse_axis("cache=off,taylor-3,newton-4-1-3")]))
    caches = [point.config.cache for point in points]
    expected = [None, CacheConfig(kind="taylor", interval=3), CacheConfig(kind="newton", interval=4, order=1, warmup=3)]
    assert caches == expected

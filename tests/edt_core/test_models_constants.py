"""What is made of the weights alone is made once within `constant_weights`, and never out of date after it."""

import copy
import io
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edt_core.config import ChainConfig
from edt_core.models import DiffusionTransformer, create_model
from edt_core.models import weight_memo as constants
from edt_core.models.attention import RelativePositionBias
from edt_core.models.weight_memo import constant_weights
from edt_core.sampling.sampler import LatentSampler
from edt_core.training.ema import EMA
from tests.support.models import TINY

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(name: str = "MDTv2-Tiny/2", seed: int = 0) -> DiffusionTransformer:
    """AMM is on in half of the blocks."""
    model = create_model(name, 32, 10)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    model.set_amm(range(0, model.config.num_blocks, 2), radius=3.0)
    return model.eval()


@torch.no_grad()
def output(model: DiffusionTransformer, precision: str = "fp32") -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return model(x, torch.tensor([10, 500]), torch.tensor([3, 4]))


@pytest.fixture(params=[True, False], ids=["written out", "fused"], autouse=True)
def modulation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edt_core.models.attention._FUSED_FROM", 256 if request.param else 1)


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[RelativePositionBias]:
    """The tables that are looked up from now on."""
    seen: list[RelativePositionBias] = []
    look_up = RelativePositionBias.forward

    def counted(self: RelativePositionBias, kept: Tensor | None = None) -> Tensor:
        seen.append(self)
        return look_up(self, kept)

    monkeypatch.setattr(RelativePositionBias, "forward", counted)
    return seen


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_bits(name: str, precision: str) -> None:
    model = tiny(name)
    expected = output(model, precision)
    with constant_weights():
        assert all(torch.equal(output(model, precision), expected) for _ in range(3))


def test_each_table_is_looked_up_once_for_each_precision(lookups: list[RelativePositionBias]) -> None:
    model = tiny()
    blocks = model.config.num_blocks
    with constant_weights():
        for precision, calls in (("fp32", 1), ("fp32", 1), ("bf16", 2), ("fp32", 2)):
            output(model, precision)
            assert len(lookups) == calls * blocks
    output(model)
    assert len(lookups) == 3 * blocks


def test_a_chain_of_samples_looks_each_table_up_once(lookups: list[RelativePositionBias]) -> None:
    model = tiny("EDT-Tiny/2")
    sampler = LatentSampler(model, ChainConfig(num_sampling_steps=5, cfg_scale=2.0), 1000)
    for calls in (1, 2):
        sampler([1, 2], 0, [0, 1])
        assert len(lookups) == calls * model.config.num_blocks


def loaded(model: DiffusionTransformer) -> DiffusionTransformer:
    model.load_state_dict(tiny(seed=1).state_dict())
    return model


def trained(model: DiffusionTransformer) -> DiffusionTransformer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(torch.ones(2, 4, 8, 8), torch.tensor([10, 500]), torch.tensor([3, 4])).square().mean().backward()
    optimizer.step()
    return model.eval()


def averaged(model: DiffusionTransformer) -> DiffusionTransformer:
    ema = EMA(tiny(seed=1), [0.5])
    ema.load([model.state_dict()])
    model.load_state_dict(ema.averages[0], assign=True)
    with constant_weights():
        output(model)
    ema.update()  # in place, in tensors that are the model's
    return model


def overwritten(model: DiffusionTransformer) -> DiffusionTransformer:
    for parameter in model.parameters():
        parameter.data.mul_(0.5)  # leaves no trace in the parameter's version
    return model


def copied(model: DiffusionTransformer) -> DiffusionTransformer:
    return loaded(copy.deepcopy(model))


def remodulated(model: DiffusionTransformer) -> DiffusionTransformer:
    model.set_amm((1,), radius=2.0)
    return model


CHANGES = [
    loaded,
    trained,
    averaged,
    overwritten,
    copied,
    remodulated,
    torch.nn.Module.bfloat16,
    torch.nn.Module.double,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_change_of_the_weights_goes_unseen(
    change: Callable[[DiffusionTransformer], DiffusionTransformer],
) -> None:
    model = tiny()
    with constant_weights():
        before = output(model)
    changed = change(model)
    fresh = create_model("MDTv2-Tiny/2", 32, 10).eval()
    fresh.set_amm(changed.config.amm_blocks, radius=changed.config.amm_radius)
    fresh.to(next(changed.parameters()).dtype).load_state_dict(changed.state_dict())
    with constant_weights():
        after = output(changed)
    assert torch.equal(after, output(fresh))
    assert not torch.equal(after.to(before.dtype), before)


def test_modulation_may_change_within() -> None:
    model, other = tiny(), tiny()
    with constant_weights():
        before = output(model)
        other.set_amm((1,), radius=2.0)
        model.set_amm((1,), radius=2.0)
        after = output(model)
    assert torch.equal(after, output(other))
    assert not torch.equal(after, before)


def test_gradients_reach_the_table_within(lookups: list[RelativePositionBias]) -> None:
    model = tiny()
    with constant_weights():
        output(model)
        model(torch.ones(2, 4, 8, 8), torch.tensor([10, 500]), torch.tensor([3, 4])).square().mean().backward()
    assert len(lookups) == 2 * model.config.num_blocks
    assert all(table.relative_position_bias_table.grad.any() for table in lookups)


def test_the_model_itself_keeps_nothing() -> None:
    model = tiny()

    def size() -> int:
        torch.save(model, file := io.BytesIO())
        return len(file.getvalue())

    before, keys = size(), model.state_dict().keys()
    with constant_weights():
        output(model)
        assert model.state_dict().keys() == keys
        assert size() == before


def test_another_thread_makes_its_own(lookups: list[RelativePositionBias]) -> None:
    model = tiny()
    with constant_weights():
        output(model)
        thread = threading.Thread(target=output, args=(model,))
        thread.start()
        thread.join()
    assert len(lookups) == 2 * model.config.num_blocks


def test_what_is_kept_has_a_limit(lookups: list[RelativePositionBias], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(constants, "_MOST_BYTES", 0)
    with constant_weights():
        assert torch.equal(output(model), output(model))
    assert len(lookups) == 2 * model.config.num_blocks

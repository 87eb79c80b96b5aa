"""Models of other widths, and muP: rates and initial weights, so that one learning rate fits all widths."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer, ModelConfig, count_parameters, model_config, shadow
from edt_core.training import loop
from edt_core.training.checkpoint import ema_model
from edt_core.training.context import LocalContext
from edt_core.training.optim import Scale, flatten_state, keep_owned, learning_rate, make_optimizer, set_rate
from edt_core.training.optimizers.mup import check_mup
from edt_core.training.start.trainable import step_flops
from edt_core.training.state import TrainState, initial_state
from tests.support.cases import suite_of
from tests.support.golden import GOLDEN, formula_weight
from tests.support.models import shallow_config
from tests.support.trainings import cut_back, place, same

pytestmark = pytest.mark.usefixtures("quickly", "one_thread")
BASES = {"EDT-Tiny/2": 64, "DiT-Tiny/2": 48, "MDTv2-Tiny/2": 56}
TIMES = 4  # as wide as the base


def config(name: str, **options: Any) -> TrainConfig:
    masked = {"masked_loss": name != "DiT-Tiny/2"}
    return TrainConfig.model_validate({"model": name, "optimizer": "adamw", **masked, **options})


def model_of(train: TrainConfig) -> ModelConfig:
    return model_config(train.model, 32, 4, width=train.width)


def fresh(train: TrainConfig) -> TrainState:
    return initial_state(train, model_of(train))


def fresh_shallow(train: TrainConfig) -> TrainState:
    """The state of a model with each kind of block, and few of each."""
    model = shallow_config(train.model)
    return initial_state(train, model if train.width is None else model.with_width(train.width))


@pytest.mark.parametrize("name", BASES)
def test_all_widths_scale_together_and_heads_keep_their_width(name: str) -> None:
    before, after = model_config(name, 32, 4), model_config(name, 32, 4, width=2 * model_config(name, 32).cond_dim)
    assert after.cond_dim == 2 * before.cond_dim
    heads = [[attention.head_dim for attention in shadow(each).attentions()] for each in (before, after)]
    assert heads[0] == heads[1]
    widths = [[attention.qkv.in_features for attention in shadow(each).attentions()] for each in (before, after)]
    assert [2 * width for width in widths[0]] == widths[1]
    assert ModelConfig.from_dict(json.loads(json.dumps(after.to_dict()))) == after
    assert model_config(name, 32, 4, width=before.cond_dim) == before
    assert count_parameters(shadow(after)) > 3 * count_parameters(shadow(before))


@pytest.mark.parametrize(
    ("name", "width", "unit"), [("EDT-Tiny/2", 96, 64), ("EDT-S/2", 300, 156), ("DiT-S/2", 96, 64)]
)
def test_another_width_would_change_the_heads(name: str, width: int, unit: int) -> None:
    with pytest.raises(ValueError, match=f"the width is {width}; use a multiple of {unit}"):
        model_config(name, width=width)


@pytest.mark.parametrize("optimizer", ["adan", "adamw", "muon"])
def test_at_the_base_width_training_is_the_standard_one_bit_for_bit(optimizer: str) -> None:
    ends = []
    for base in (None, 64):
        train = config("EDT-Tiny/2", optimizer=optimizer, mup_base_width=base, weight_decay=0.1)
        state = stepped(train, steps=3)
        ends.append((state.model.state_dict(), *flatten_state(state.optimizer)))
    (weights, tensors, groups), (other, other_tensors, other_groups) = ends
    assert all(torch.equal(value, other[name]) for name, value in weights.items())
    assert all(torch.equal(value, other_tensors[name]) for name, value in tensors.items())
    assert groups == other_groups


def inputs_of(config: ModelConfig, seed: int, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and labels that do not depend on the width."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, config.in_channels, config.latent_size, config.latent_size, generator=generator)
    t = torch.randint(1000, (rows,), generator=generator)
    return x, t, torch.randint(config.num_classes, (rows,), generator=generator)


def stepped(train: TrainConfig, steps: int) -> TrainState:
    """The state after some steps towards fixed targets, at the rate of the first step."""
    state = fresh_shallow(train)
    for step in range(steps):
        state.zero_grad()
        x, t, y = inputs_of(state.model.config, step)
        output = state.model(x, t, y)
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(step))
        (output - target).square().mean().backward()
        for parameter in state.model.masking_parameters():
            parameter.grad = None
        set_rate(state.optimizer, learning_rate(train, 0, 1000))
        state.optimizer.step()
    return state


def activations(model: DiffusionTransformer) -> dict[str, Tensor]:
    """The outputs of all blocks, and of the model, for fixed inputs."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _, __, output, name=f"block {index}": outputs.update({name: output}))
        for index, block in enumerate(model.ordered_blocks())
    ]
    with torch.no_grad():
        outputs["output"] = model(*inputs_of(model.config, 99))
    for hook in hooks:
        hook.remove()
    return outputs


def coordinates(train: TrainConfig) -> dict[str, float]:
    """The root mean square of the change of each activation over 5 steps."""
    before, after = activations(fresh_shallow(train).model), activations(stepped(train, steps=5).model)
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in before}


def slopes(name: str, optimizer: str, base: int | None) -> list[float]:
    """The slopes of the logarithms of the changes against that of the width, from the base to a width of 4 times it."""
    widths = [BASES[name], TIMES * BASES[name]]
    narrow, wide = (
        coordinates(config(name, optimizer=optimizer, width=width, mup_base_width=base, lr=2e-3)) for width in widths
    )
    return [math.log(wide[place] / narrow[place], TIMES) for place in narrow]


# Each family, and each optimizer.
CHECKED = [("EDT-Tiny/2", "adan"), ("MDTv2-Tiny/2", "adamw"), ("DiT-Tiny/2", "muon")]
ALIKE = [("EDT-Tiny/2", "adamw"), ("DiT-Tiny/2", "adamw"), ("DiT-Tiny/2", "adan")]


@pytest.mark.parametrize(("name", "optimizer"), suite_of(CHECKED, CHECKED + ALIKE))
def test_activations_change_as_much_at_all_widths(name: str, optimizer: str) -> None:
    """The coordinate check of arXiv 2203.03466, appendix D.1."""
    mup, standard = (slopes(name, optimizer, base) for base in (BASES[name], None))
    assert float(np.mean(mup)) < 0.1
    assert max(mup) < 0.25
    assert float(np.mean(standard)) > 0.4


@pytest.mark.parametrize("name", BASES)
def test_initial_weights_are_of_the_base_where_inputs_do_not_grow(name: str) -> None:
    """Variances of hidden matrices decrease as 1 / width, those of inputs stay, and the output is zero."""
    base = BASES[name]
    narrow, wide = (
        dict(fresh(config(name, width=width, mup_base_width=base)).model.named_parameters())
        for width in (base, TIMES * base)
    )

    def spread(weights: Mapping[str, Tensor], key: str) -> float:
        return float(weights[key].detach().std())

    for key in ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight"):
        assert spread(wide, key) == pytest.approx(spread(narrow, key), rel=0.15), key
    first = next(key for key in wide if key.endswith("attn.qkv.weight"))
    for key in ("t_embedder.mlp.2.weight", first, first.replace("attn.qkv", "mlp.fc2")):
        assert spread(wide, key) == pytest.approx(spread(narrow, key) / TIMES**0.5, rel=0.1), key
    assert not wide["final_layer.linear.weight"].any()


@pytest.mark.parametrize("name", BASES)
def test_steps_equal_those_of_mup(name: str) -> None:
    """Weights after one and three steps of MuAdamW, see mup_manifest.json."""
    golden = np.load(GOLDEN / "mup.npz")
    base, width = json.loads((GOLDEN / "mup_manifest.json").read_text())["widths"][name]
    state = fresh(config(name, width=width, mup_base_width=base, lr=0.01, weight_decay=0.1, masked_loss=True))
    named = dict(state.model.named_parameters())
    with torch.no_grad():
        for key, parameter in named.items():
            parameter.copy_(formula_weight(key, parameter.shape))
    for step in range(3):
        for key, parameter in named.items():
            parameter.grad = 0.01 * formula_weight(f"{step}.{key}", parameter.shape)
        state.optimizer.step()
        if step in (0, 2):
            ours = np.stack([parameter.detach().flatten()[:8].numpy() for parameter in named.values()])
            np.testing.assert_allclose(ours, golden[f"{name.partition('-')[0].lower()}_{step + 1}"], rtol=0, atol=1e-6)


def test_rates_follow_the_schedule_times_their_factors() -> None:
    train = config("EDT-Tiny/2", width=128, mup_base_width=64, weight_decay=0.1, lr=0.01)
    state = fresh(train)
    set_rate(state.optimizer, 0.004)
    assert [(group["lr"], group["eps"]) for group in state.optimizer.param_groups] == [
        (0.004, 1e-8),
        (0.002, 1e-8),
        (0.002, 2e-8),
    ]
    products = [group["lr"] * group["weight_decay"] for group in state.optimizer.param_groups]
    assert products == pytest.approx([0.0004] * 3)
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    _, hidden, output = ([names[id(p)] for p in group["params"]] for group in state.optimizer.param_groups)
    assert output == ["final_layer.linear.weight"]
    slow = set(hidden)
    assert {"t_embedder.mlp.2.weight", "down_blocks.0.reduction.weight"} <= slow
    assert not slow & {"t_embedder.mlp.0.weight", "x_embedder.proj.weight", "y_embedder.embedding_table.weight"}
    assert not any(name.endswith(("bias", "table")) for name in slow)


def test_muon_has_the_square_root_for_its_matrices() -> None:
    groups = fresh(config("EDT-Tiny/2", optimizer="muon", width=256, mup_base_width=64)).optimizer.param_groups
    factors = {(group["parts"], group.get("rate_factor", 1.0)) for group in groups}
    assert factors == {(3, 0.5), (1, 0.5), (0, 1.0), (0, 0.25)}


def test_a_checkpoint_has_the_groups_and_refuses_another_base_width(tmp_path: Path, dataset: LatentDataset) -> None:
    """A resumed training ends with the bits of the uninterrupted one. Its model is an ordinary one."""
    train = config(
        "EDT-Tiny/2", width=128, mup_base_width=64, optimizer="adan", global_batch_size=4, max_steps=3, log_every=1
    )
    train = train.model_copy(update={"checkpoint_every": 1})
    model = shallow_config(train.model).with_width(128)
    whole = loop.train(train, model, dataset, LocalContext(tmp_path / "whole"))
    context = cut_back(tmp_path / "whole", tmp_path / "again", 2)
    again = loop.train(train, model, dataset, context)
    assert same(whole.model.state_dict(), again.model.state_dict())
    assert same(flatten_state(whole.optimizer)[0], flatten_state(again.optimizer)[0])
    whole_rate, half_rate, _ = (group["lr"] for group in again.optimizer.param_groups)
    assert whole_rate == 2 * half_rate
    with pytest.raises(UserError, match="mup_base_width 64 instead of at its default"):
        loop.train(train.model_copy(update={"mup_base_width": None}), model, dataset, context)
    loaded = ema_model(place(tmp_path / "whole", 3))
    assert loaded.config == model
    assert same(loaded.state_dict(), dict(whole.ema.averages[0]))


def test_a_training_of_more_width_costs_what_its_model_does() -> None:
    narrow, wide = (config("DiT-Tiny/2", width=width, mup_base_width=48) for width in (48, 96))
    assert step_flops(wide, model_of(wide)) > 3 * step_flops(narrow, model_of(narrow))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("UViT-Tiny/2", {}, "other initial weights than muP is known for"),
        ("EDT-Tiny/2", {"mup_base_width": 50}, "mup_base_width is no width of this model.*multiple of 64"),
        ("EDT-Tiny/2", {"align": "autoencoder"}, "whose head has no muP"),
    ],
)
def test_what_has_no_mup_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    train = config(name, **{"mup_base_width": 64, **options})
    with pytest.raises(UserError, match=message):
        check_mup(train, model_of(train))


@pytest.mark.parametrize("optimizer", ["adan", "adamw", "muon"])
def test_ranks_that_divide_the_state_step_as_one_does(optimizer: str) -> None:
    """Of each scale a rank may own no parameter. The states of both ranks together are the undivided one's."""

    def built() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(6, 4, generator=generator)) for _ in range(4)]
        scales = {weights[1]: Scale(0.5), weights[2]: Scale(0.5), weights[3]: Scale(0.5, 2.0)}
        train = TrainConfig.model_validate({"optimizer": optimizer, "weight_decay": 0.1})
        return weights, make_optimizer(train, weights, {weights[1]: 3}, scales)

    def step(weights: list[nn.Parameter], stepped: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in weights:
            weight.grad = torch.randn(6, 4, generator=generator)
        set_rate(stepped, 0.01)
        stepped.step()

    whole, undivided = built()
    state: dict[str, Tensor] = {}
    for seed in range(3):
        step(whole, undivided, seed)
    for owned in ({0, 1}, {2, 3}):
        weights, divided = built()
        places = keep_owned(divided, {weights[index] for index in owned})
        for seed in range(3):
            step(weights, divided, seed)
        assert all(torch.equal(weights[index], whole[index]) for index in owned)
        tensors, groups = flatten_state(divided, places)
        state |= tensors
        assert [group["params"] for group in groups] == [
            group["params"] for group in undivided.state_dict()["param_groups"]
        ]
    assert same(state, flatten_state(undivided)[0])

"""Fine-tuning of few parameters: which are trained, what a checkpoint holds, and the ordinary model it gives."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.errors import Stopped, UserError
from edt_core.models import FAMILIES, build_model, model_config
from edt_core.training.checkpoint import load_checkpoint
from edt_core.training.context import LocalContext, Request
from edt_core.training.loop import TrainState, train
from edt_core.training.start.initial import initial_checkpoint
from edt_core.training.start.trainable import merged, prepare_trainable, step_flops
from edt_core.training.state import initial_state
from tests.edt_core.test_training_start import NAMES, base_of
from tests.support.cases import suite_of
from tests.support.models import TINY, shallow_config
from tests.support.trainings import contents, narrow, place, same

pytestmark = pytest.mark.usefixtures("quickly", "one_thread")

CONFIG = TrainConfig(
    model="EDT-Tiny/2",
    global_batch_size=16,
    max_steps=6,
    lr=1e-2,
    lr_schedule="constant",
    ema_decay=(0.9, 0.5),
    log_every=2,
    checkpoint_every=2,
    trainable="difffit",
)
MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"


def run(folder: Path, dataset: LatentDataset, context: LocalContext | None = None, **fields: Any) -> TrainState:
    config, base = CONFIG.model_copy(update=fields), base_of(narrow(), seed=5, digest="d" * 64)
    context = context or LocalContext(folder)
    return train(config, narrow(), dataset, context, lambda: initial_checkpoint(config, narrow(), base, NAMES)[0])


@pytest.fixture(scope="module")
def whole(dataset: LatentDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    folder = tmp_path_factory.mktemp("difffit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_core.training.loop.matmul_rate", lambda *_: 1e9)
        return folder, run(folder, dataset)


@pytest.mark.parametrize("name", TINY)
def test_what_is_trained(name: str) -> None:
    model = build_model(shallow_config(name))
    table = FAMILIES[model.config.architecture].released.labels
    blocks = [block for block in model.modules() if hasattr(block, "attn") and hasattr(block, "mlp")]
    affine = {
        f"{owner}.{last}"
        for owner, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for last, _ in module.named_parameters()
    }
    biases = {key for key, _ in model.named_parameters() if key.endswith(".bias")}
    names = prepare_trainable(model, "difffit")
    assert names is not None
    scales = {key for key in names if key.endswith(".gamma")}
    assert len(scales) == 2 * len(blocks)
    assert names == biases | affine | scales | {table}
    assert {key for key, value in model.named_parameters() if value.requires_grad} == names
    assert prepare_trainable(build_model(shallow_config(name)), "bias") == biases | {table}
    plain = build_model(shallow_config(name))
    assert prepare_trainable(plain, "all") is None
    assert all(value.requires_grad for value in plain.parameters())


def test_the_share_of_dit_xl_is_that_of_the_paper() -> None:
    """Table 1 of arXiv 2304.06648 has 0.12 % of DiT-XL/2, with the class table of the data set, here Food-101's."""
    config = model_config("DiT-XL/2", 256, 101)
    with torch.device("meta"):
        model = build_model(config)
    total = sum(value.numel() for value in model.parameters())
    prepare_trainable(model, "difffit")
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    blocks = 28 * (3 + 1 + 4 + 1 + 6 + 2) * 1152  # qkv, proj, fc1, fc2, adaLN, two scales
    ends = (1 + 2 + 2 + 102) * 1152 + 32  # patches, timestep, last adaLN, classes, output
    assert trained == blocks + ends
    assert 0.0009 < trained / total < 0.0013


def test_the_gradients_of_frozen_weights_are_no_cost() -> None:
    """Of a forward pass and two backward ones, the one for the weights is left out but for little."""
    config = model_config("DiT-S/2", 256, 10)
    whole, few = (
        step_flops(CONFIG.model_copy(update={"masked_loss": False, "trainable": choice}), config)
        for choice in ("all", "difffit")
    )
    assert 0.6 < few / whole < 0.72


@pytest.mark.parametrize("name", TINY)
def test_a_merged_model_equals_the_one_with_scales(name: str) -> None:
    config = shallow_config(name)
    base = base_of(config, seed=1)
    model = build_model(config)
    prepare_trainable(model, "difffit")
    model.load_state_dict(base.weights, strict=False)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith(".gamma"):
                value.copy_(1 + 0.5 * torch.randn(value.shape, generator=rng))
    plain = build_model(config)
    plain.load_state_dict(merged(model.state_dict()))
    x, t, y = torch.randn(3, 4, 8, 8, generator=rng), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 4])
    with torch.no_grad():
        one, other = model.eval()(x, t, y), plain.eval()(x, t, y)
        unscaled = build_model(config)
        unscaled.load_state_dict(base.weights)
        assert float((unscaled.eval()(x, t, y) - one).abs().max()) > 1e-3  # the scales do something
    assert float((one - other).abs().max()) <= 1e-6 * max(1.0, float(one.abs().max()))


def test_what_is_frozen_keeps_every_bit(whole: tuple[Path, TrainState]) -> None:
    state, base = whole[1], base_of(narrow(), seed=5)
    assert state.trained is not None
    weights = state.model.state_dict()
    for key, value in base.weights.items():
        assert torch.equal(weights[key], value) == (key not in state.trained), key
    assert all(not torch.equal(weights[key], torch.ones_like(weights[key])) for key in weights if key.endswith("gamma"))


def test_a_checkpoint_holds_the_delta_and_the_digest_of_its_base(whole: tuple[Path, TrainState]) -> None:
    folder, state = whole
    checkpoint = load_checkpoint(place(folder, 6))
    assert state.trained is not None
    for file in (MODEL, EMA, "ema-0.5.safetensors"):
        assert checkpoint.tensors[file].keys() == state.trained, file
    assert checkpoint.state["base"] == "d" * 64
    assert "base" not in run_state_of_all()
    (group,) = checkpoint.state["optimizer_groups"]
    assert len(group["params"]) == len(state.trained)


def run_state_of_all() -> Any:
    config = CONFIG.model_copy(update={"trainable": "all"})
    return initial_checkpoint(config, narrow(), base_of(narrow(), digest="d" * 64), NAMES)[0].state


def test_memory_and_gradients_are_of_what_is_trained(whole: tuple[Path, TrainState]) -> None:
    state = whole[1]
    assert state.trained is not None
    trained = sum(value.numel() for key, value in state.model.named_parameters() if key in state.trained)
    total = sum(value.numel() for value in state.model.parameters())
    held = sum(
        value.numel()
        for values in state.optimizer.state.values()
        for value in values.values()
        if torch.is_tensor(value) and value.ndim
    )
    assert trained < 0.2 * total
    assert held <= 4 * trained  # Adan has four tensors of a parameter's size
    assert {key for key, value in state.model.named_parameters() if value.grad is not None} <= state.trained
    assert state.ema.averages[0].keys() == state.trained


@pytest.mark.parametrize(
    ("stop", "trainable"), suite_of([(1, "bias"), (3, "difffit")], product((1, 3), ("difffit", "bias")))
)
def test_a_resumed_training_equals_an_uninterrupted_one(
    stop: int, trainable: str, whole: tuple[Path, TrainState], dataset: LatentDataset, tmp_path: Path
) -> None:
    uninterrupted = whole[0]
    if trainable == "bias":
        uninterrupted = tmp_path / "whole"
        run(uninterrupted, dataset, trainable=trainable)
    asked = iter([Request.NOTHING] * (stop - 1) + [Request.STOP])
    with pytest.raises(Stopped):
        run(tmp_path / "cut", dataset, LocalContext(tmp_path / "cut", request=lambda: next(asked)), trainable=trainable)
    run(tmp_path / "cut", dataset, trainable=trainable)
    for step in (4, 6):
        assert contents(place(tmp_path / "cut", step)) == contents(place(uninterrupted, step))


def test_the_average_is_of_an_ordinary_model(whole: tuple[Path, TrainState]) -> None:
    state = whole[1]
    plain = build_model(narrow())
    plain.load_state_dict(state.average())
    assert not same(plain.state_dict(), base_of(narrow(), seed=5).weights)  # type: ignore[arg-type]


def test_a_delta_of_another_base_is_refused(whole: tuple[Path, TrainState], dataset: LatentDataset) -> None:
    base = base_of(narrow(), seed=6, digest="e" * 64)
    with pytest.raises(
        UserError, match=r"from the base model dddddddddddd, and this training starts from eeeeeeeeeeee"
    ):
        train(
            CONFIG.model_copy(update={"max_steps": 6}),
            narrow(),
            dataset,
            LocalContext(whole[0]),
            lambda: initial_checkpoint(CONFIG, narrow(), base, NAMES)[0],
        )


def test_new_classes_and_masks_go_with_it(dataset: LatentDataset) -> None:
    """A masked pass that is off takes its parameters out, the scales among them."""
    config = CONFIG.model_copy(update={"masked_loss": False, "model": "MDTv2-Tiny/2"})
    state = initial_state(config, shallow_config("MDTv2-Tiny/2"))
    trained = {key for key, value in state.model.named_parameters() if value.requires_grad}
    assert state.trained is not None
    assert set(state.trained - trained) == {key for key in state.trained if key.startswith("sideblocks")}

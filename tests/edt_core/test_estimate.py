"""The estimate of a training before it starts, against what it then takes."""

import gc
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from edt_core.config import TrainConfig
from edt_core.models import (
    DiffusionTransformer,
    build_model,
    count_macs,
    count_parameters,
    draw_masks,
    model_config,
    shadow,
)
from edt_core.training.estimate import estimate, saved
from edt_core.training.state import initial_state
from edt_core.training.step import micro_batches
from tests.support.cases import suite_of
from tests.support.models import shallow_config

TINY = shallow_config("EDT-Tiny/2")


def bytes_kept(model: DiffusionTransformer, batch: int, passes: int = 2, precision: str = "fp32") -> int:
    """What the backward pass of a real forward pass keeps, weights aside."""
    kept: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    rows, side = passes * batch, model.config.latent_size
    x, zeros = torch.randn(rows, 4, side, side), torch.zeros(rows, dtype=torch.int64)
    masks = draw_masks(model.config, batch, torch.Generator().manual_seed(0)) if passes == 2 else None
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = model(x, zeros, zeros, masks)
    del output
    return sum(kept.values())


@pytest.mark.parametrize("name", ["EDT-Tiny/2", "MDTv2-Tiny/2"])
def test_the_memory_of_a_pass_is_told_without_running_it(name: str) -> None:
    config = model_config(name, 32, 10)
    for batch in (1, 5):
        estimated = saved(shadow(config).train(), batch, 2).activations
        assert estimated == pytest.approx(bytes_kept(build_model(config).train(), batch), rel=0.1)


def test_a_pass_leaves_no_tensor_behind() -> None:
    """A plan of many models would else hold all of them: the collector does not see what autograd's nodes keep."""

    def tensors() -> int:
        gc.collect()
        return sum(type(item) is FakeTensor for item in gc.get_objects())

    model = shadow(TINY).train()
    saved(model, 1, 2)
    before = tensors()
    saved(model, 1, 2)
    assert tensors() <= before


WIDE = {  # few blocks, of the width of S: in a narrow one the inputs of norms count for less
    "EDT-S/2": replace(model_config("EDT-S/2", 128, 10), depths=(1,) * 5),
    "DiT-S/2": replace(model_config("DiT-S/2", 128, 10), depth=2),
}


@pytest.mark.parametrize(("name", "passes"), suite_of([("EDT-S/2", 2)], [("EDT-S/2", 2), ("DiT-S/2", 1)]))
def test_in_bf16_each_tensor_counts_in_its_own_dtype(name: str, passes: int) -> None:
    """Half of fp32 would be a fifth too little: the residual stream and the inputs of norms are float32."""
    config = WIDE[name]
    model = build_model(config).train()
    for batch in (1, 3):
        real = bytes_kept(model, batch, passes, "bf16")
        estimated = saved(shadow(config).train(), batch, passes, "bf16").activations
        assert estimated == pytest.approx(real, rel=0.1)
        exact = saved(shadow(config).train(), batch, passes).activations
        assert exact / 2 < 0.9 * real


@pytest.mark.parametrize(("name", "passes"), suite_of([("DiT-S/2", 1)], [("EDT-S/2", 2), ("DiT-S/2", 1)]))
def test_a_stream_of_tokens_in_bf16_is_counted(name: str, passes: int) -> None:
    """By what a real pass keeps; and half of the stream of float32 tokens is saved, but not more."""
    config = WIDE[name]
    real = build_model(config).train()
    real.stream_dtype = torch.bfloat16
    for checkpointing in (False, True):
        real.activation_checkpointing = checkpointing
        sizes = {}
        for dtype in (None, torch.bfloat16):
            model = shadow(config).train()
            model.activation_checkpointing, model.stream_dtype = checkpointing, dtype
            sizes[dtype] = saved(model, 3, passes, "bf16").activations
        assert sizes[torch.bfloat16] == pytest.approx(bytes_kept(real, 3, passes, "bf16"), rel=0.1)
        assert 0.4 * sizes[None] < sizes[torch.bfloat16] < 0.95 * sizes[None]


def test_the_estimate_of_a_training_has_its_stream_of_tokens() -> None:
    """In fp32 there is nothing to round."""

    def activations(**fields: object) -> int:
        return estimate(TrainConfig(global_batch_size=8, **fields), TINY, 100).activations

    assert activations(precision="bf16", residual_dtype="bf16") < 0.95 * activations(precision="bf16")
    assert activations(residual_dtype="bf16") == activations()


def test_the_kernels_of_a_gpu_do_not_keep_the_scores() -> None:
    """For EDT, whose bias is trained, the backward pass has the gradient of one block's scores."""
    config = replace(model_config("EDT-S/2", 256, 10), depths=(1,) * 5)
    model = shadow(config).train()
    rows, heads, tokens = 4, 6, 256
    for precision, item in (("fp32", 4), ("bf16", 2)):
        written, fused = (saved(model, 2, 2, precision, fused=fused) for fused in (False, True))
        assert fused.activations < 0.95 * written.activations
        assert fused.scores == written.scores == rows * heads * tokens**2 * item
    assert saved(shadow(WIDE["DiT-S/2"]).train(), 2, 1).scores == 0


def test_the_highest_moment_is_in_the_backward_pass_or_in_the_optimizer() -> None:
    small = estimate(TrainConfig(global_batch_size=1, masked_loss=False), replace(TINY, depths=(1, 1, 1, 1, 1)), 100)
    assert small.activations < small.weights
    assert small.temporary == small.weights - small.activations  # the optimizer's
    large = estimate(TrainConfig(global_batch_size=512), TINY, 100)
    assert large.activations > large.weights
    assert 0 < large.temporary < large.activations  # of the attention's bias
    for each in (small, large):
        parts = each.weights + each.gradients + each.optimizer + each.ema + each.activations + each.temporary
        assert each.memory == parts


def test_tensors_of_a_training_are_counted_as_they_are() -> None:
    for optimizer in ("adan", "adamw"):
        config = TrainConfig(model="EDT-Tiny/2", optimizer=optimizer, ema_decay=(0.9, 0.99), global_batch_size=8)
        estimated, state = estimate(config, TINY, 100), initial_state(config, TINY)
        for parameter in state.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        state.optimizer.step()
        tensors = [v for s in state.optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.ndim]
        assert estimated.optimizer == sum(tensor.nbytes for tensor in tensors)
        assert estimated.ema == pytest.approx(sum(v.nbytes for a in state.ema.averages for v in a.values()), rel=0.02)
        assert estimated.parameters == count_parameters(state.model)
        assert estimated.macs == count_macs(state.model)


def test_more_workers_or_smaller_micro_batches_take_less_memory_each() -> None:
    def activations(**fields: object) -> int:
        return estimate(TrainConfig(global_batch_size=64, **fields), TINY, 100).activations

    whole = activations()
    assert activations(num_workers=4) < whole / 3
    assert activations(num_workers=(1, 4)) == activations(num_workers=4)
    assert activations(micro_batch_size=16) == activations(num_workers=4)
    assert activations(precision="bf16") < whole
    assert activations(activation_checkpointing=True) < whole
    assert activations(masked_loss=False) < whole


def test_steps_and_epochs() -> None:
    config = TrainConfig(global_batch_size=256, max_steps=400_000)
    estimated = estimate(config, TINY, 1_281_167)
    assert estimated.steps_per_epoch == pytest.approx(5004.56, abs=0.01)
    assert estimated.steps == 400_000
    assert "5,004.6" in str(estimated)
    assert estimate(replace_field(config, max_epochs=2.0), TINY, 1000).steps == 8


def replace_field(config: TrainConfig, **fields: object) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), **fields})


def test_a_model_of_the_paper_is_told_in_the_paper_s_terms() -> None:
    estimated = str(estimate(TrainConfig(model="EDT-S/2", precision="bf16"), model_config("EDT-S/2"), 1_281_167))
    assert "38,329,146" in estimated
    assert "2.67 G" in estimated
    larger = replace(TINY, depths=(4, 1, 1, 1, 4))
    assert estimate(TrainConfig(), larger, 10).macs > estimate(TrainConfig(), TINY, 10).macs


def test_micro_batches_cover_a_share_in_order() -> None:
    for samples in range(1, 40):
        for most in range(1, 41):
            cuts = list(micro_batches(samples, most))
            assert [i for cut in cuts for i in range(samples)[cut]] == list(range(samples))
            sizes = [cut.stop - cut.start for cut in cuts]
            assert max(sizes) <= most
            assert max(sizes) - min(sizes) <= 1

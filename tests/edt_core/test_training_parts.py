"""What a training is made of: optimizers as published, averages, losses by name, times, draws that know no ranks."""

import json
import math
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
import torch

from edt_core.config import TrainConfig
from edt_core.data.subsets import share
from edt_core.diffusion import objective_of
from edt_core.models import ModelConfig, mask_sites, model_config
from edt_core.training import meter as meters
from edt_core.training.draws import draw_step
from edt_core.training.ema import EMA
from edt_core.training.history import QUARTILES, History, named_losses
from edt_core.training.meter import Meter, device_memory, matmul_rate
from edt_core.training.optim import (
    clip_gradients,
    flatten_state,
    gradient_norm,
    learning_rate,
    make_optimizer,
    restore_state,
)
from edt_core.training.state import ema_files
from edt_core.training.step import micro_batches

DRAWN = TrainConfig(global_batch_size=24, seed=3, class_dropout_prob=0.5)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def edt() -> ModelConfig:
    return model_config("EDT-Tiny/2", 32, 4)


# --- draws


@pytest.mark.parametrize("name", ["EDT-Tiny/2", "MDTv2-Tiny/2"])
@pytest.mark.parametrize(("batch", "world_size"), [(24, 1), (24, 2), (24, 3), (24, 5), (24, 24), (64, 8)])
def test_draws_of_ranks_join_to_those_of_the_global_batch(batch: int, world_size: int, name: str) -> None:
    config, model = DRAWN.model_copy(update={"global_batch_size": batch}), model_config(name, 32, 4)
    whole = draw_step(config, 5, model)
    parts = [draw_step(config, 5, model, share(batch, rank, world_size)) for rank in range(world_size)]
    assert torch.equal(torch.cat([part.posterior_noise for part in parts]), whole.posterior_noise)
    assert torch.equal(torch.cat([part.noise for part in parts], dim=1), whole.noise)
    assert torch.equal(torch.cat([part.drop_label for part in parts], dim=1), whole.drop_label)
    assert all(torch.equal(part.uniforms, whole.uniforms) for part in parts)
    assert len(whole.masks) == len(mask_sites(model)) > 0
    for site in range(len(mask_sites(model))):
        assert torch.equal(torch.cat([part.masks[site] for part in parts]), whole.masks[site])
    cuts = list(micro_batches(batch, 5))
    assert torch.equal(torch.cat([whole.rows(cut).noise for cut in cuts], dim=1), whole.noise)


def test_a_larger_batch_begins_with_the_draws_of_a_smaller_one(edt: ModelConfig) -> None:
    small, large = (
        draw_step(DRAWN.model_copy(update={"global_batch_size": batch}), 5, edt, slice(3, 20)) for batch in (20, 100)
    )
    assert torch.equal(small.noise, large.noise)
    assert torch.equal(small.uniforms, large.uniforms[:20])


def test_without_the_masked_loss_only_the_full_pass_is_drawn(edt: ModelConfig) -> None:
    whole, full = draw_step(DRAWN, 5, edt), draw_step(DRAWN.model_copy(update={"masked_loss": False}), 5, edt)
    assert torch.equal(full.noise, whole.noise[:1])
    assert torch.equal(full.drop_label, whole.drop_label[:1])
    assert full.masks == ()


def test_what_is_pinned_is_a_rank_s_share_and_contiguous(edt: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr("edt_core.training.draws.on_device", lambda device: nullcontext())
    config = DRAWN.model_copy(update={"global_batch_size": 64})
    share_of_rank = draw_step(config, 5, edt, share(64, 1, 4))
    for draws in (share_of_rank, draw_step(config, 5, edt).rows(share(64, 1, 4))):
        pinned.clear()
        draws.pinned(torch.device("cuda", 0))
        shapes = [(16, 4, 8, 8), (2, 16), (2, 16, 4, 8, 8), *((16, site.tokens) for site in mask_sites(edt))]
        assert [tuple(tensor.shape) for tensor in pinned] == shapes
        assert all(tensor.is_contiguous() for tensor in pinned)
    for tensor in (share_of_rank.posterior_noise, share_of_rank.noise, share_of_rank.drop_label):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()  # no larger memory behind it


def test_draws_are_a_function_of_seed_and_step(edt: ModelConfig) -> None:
    first, again, later = (draw_step(DRAWN, step, edt) for step in (5, 5, 6))
    other = draw_step(DRAWN.model_copy(update={"seed": 4}), 5, edt)
    for name in ("posterior_noise", "drop_label", "uniforms", "noise"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(later, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert not torch.equal(first.noise[0], first.noise[1])  # the masked pass has noise of its own
    assert not torch.equal(first.drop_label[0], first.drop_label[1])


def test_labels_are_dropped_at_the_stated_rate(edt: ModelConfig) -> None:
    for probability in (0.0, 0.3):
        config = DRAWN.model_copy(update={"class_dropout_prob": probability})
        dropped = torch.cat([draw_step(config, step, edt).drop_label.flatten() for step in range(40)])
        assert float(dropped.float().mean()) == pytest.approx(probability, abs=0.04)


# --- cuts of a batch


def test_micro_batches_are_even_cuts_of_the_whole() -> None:
    for samples in range(1, 40):
        for most in range(1, 45):
            cuts = list(micro_batches(samples, most))
            assert [place for cut in cuts for place in range(cut.start, cut.stop)] == list(range(samples))
            sizes = [cut.stop - cut.start for cut in cuts]
            assert max(sizes) <= most
            assert max(sizes) - min(sizes) <= 1
            assert len(cuts) == math.ceil(samples / most)  # no more of them than needed


# --- optimizers and rates


def rates(total: int = 1000, **options: object) -> list[float]:
    config = TrainConfig(lr=1e-3, lr_final=5e-5, max_steps=total, **options)
    return [learning_rate(config, step, total) for step in range(total + 1)]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_falls_from_lr_to_lr_final(schedule: str) -> None:
    fall = rates(lr_schedule=schedule)
    assert fall[0] == 1e-3
    assert fall[500] == pytest.approx((1e-3 + 5e-5) / 2)
    assert fall[1000] == pytest.approx(5e-5)
    assert all(after < before for before, after in pairwise(fall))


def test_a_cosine_falls_late_and_a_line_evenly() -> None:
    line, cosine = rates(lr_schedule="linear"), rates(lr_schedule="cosine")
    assert line[250] == pytest.approx(0.75 * 1e-3 + 0.25 * 5e-5)
    expected = 5e-5 + (1e-3 - 5e-5) * (1 + math.cos(math.pi / 4)) / 2
    assert cosine[250] == pytest.approx(expected)


def test_a_constant_rate_does_not_fall() -> None:
    assert set(rates(lr_schedule="constant")) == {1e-3}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_rises_from_zero_and_then_the_fall_begins(schedule: str) -> None:
    warm = rates(lr_schedule=schedule, warmup_steps=100)
    assert warm[:100] == pytest.approx([1e-3 * (step + 1) / 100 for step in range(100)])
    assert warm[99] == warm[100] == pytest.approx(1e-3)
    assert warm[1000] == pytest.approx(1e-3 if schedule == "constant" else 5e-5)
    if schedule != "constant":
        assert warm[550] == pytest.approx((1e-3 + 5e-5) / 2)


def test_a_warm_up_longer_than_the_training_is_only_a_rise() -> None:
    config = TrainConfig(lr=1e-3, warmup_steps=50, max_steps=10)
    assert [learning_rate(config, step, 10) for step in range(10)] == pytest.approx([2e-5 * (k + 1) for k in range(10)])


def test_epochs_end_a_training_before_its_steps() -> None:
    config = TrainConfig(max_steps=100, global_batch_size=16, max_epochs=1.5)
    assert config.total_steps(96) == 9
    assert config.total_steps(97) == 10  # the last samples too
    assert config.total_steps(10_000) == 100
    assert TrainConfig(max_steps=100).total_steps(1) == 100


def adan_of_the_paper(
    theta: torch.Tensor, grads: list[torch.Tensor], lr: float, betas: tuple[float, float, float], eps: float
) -> torch.Tensor:
    """Algorithm 1 of arXiv 2208.06677 with the bias corrections of its section on implementation; weight decay 0.

    The betas here are the 1 - beta of the paper, as in its published code.
    """
    b1, b2, b3 = betas
    m = v = n = torch.zeros_like(theta)
    previous = grads[0]
    for k, g in enumerate(grads, start=1):
        difference = g - previous
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * difference
        n = b3 * n + (1 - b3) * (g + b2 * difference) ** 2
        scale = lr / ((n / (1 - b3**k)).sqrt() + eps)
        theta = theta - scale * (m / (1 - b1**k) + b2 * v / (1 - b2**k))
        previous = g
    return theta


def drawn_gradients(number: int = 20) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(50, generator=rng, dtype=torch.float64) for _ in range(number)]


def test_the_library_s_adan_is_the_paper_s() -> None:
    start, *grads = drawn_gradients(21)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer(TrainConfig(optimizer="adan", lr=1e-2), [parameter])
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    expected = adan_of_the_paper(start, grads, 1e-2, (0.98, 0.92, 0.99), 1e-8)
    assert torch.allclose(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["adan", "adamw"])
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_an_optimizer_goes_on_from_its_flat_state(name: str, stop: int) -> None:
    start, *grads = drawn_gradients(15)
    config = TrainConfig(optimizer=name, lr=1e-2, weight_decay=0.01)

    def stepped(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, some: list[torch.Tensor]) -> None:
        for grad in some:
            parameter.grad = grad.clone()
            optimizer.step()

    whole = torch.nn.Parameter(start.clone())
    stepped(whole, make_optimizer(config, [whole]), grads)

    first = torch.nn.Parameter(start.clone())
    optimizer = make_optimizer(config, [first])
    stepped(first, optimizer, grads[:stop])
    tensors, groups = flatten_state(optimizer)
    tensors = {key: value.clone() for key, value in tensors.items()}
    groups = json.loads(json.dumps(groups))
    second = torch.nn.Parameter(first.detach().clone())
    resumed = make_optimizer(config, [second])
    stepped(second, resumed, grads[:3])  # what it had before is replaced
    second.data.copy_(first.data)
    restore_state(resumed, tensors, groups)
    stepped(second, resumed, grads[stop:])
    assert torch.equal(whole, second)


def test_the_norm_is_that_of_all_gradients_and_clipping_keeps_their_direction() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), ())]
    unused = torch.nn.Parameter(torch.zeros(2))
    for k, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, k + 1.0)
    everything = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    norm = gradient_norm([*parameters, unused])
    assert float(norm) == pytest.approx(float(everything.norm()))
    clip_gradients([*parameters, unused], norm, float(norm) + 1)
    assert torch.equal(gradient_norm(parameters), norm)  # it was short enough
    clip_gradients([*parameters, unused], norm, 0.5)
    assert float(gradient_norm(parameters)) == pytest.approx(0.5)
    after = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    assert torch.equal(after, everything * (0.5 / float(norm)))


def test_gradients_of_zero_are_not_clipped() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.zeros(3)
    clip_gradients([parameter], gradient_norm([parameter]), 0.5)
    assert torch.equal(parameter.grad, torch.zeros(3))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_the_norm_is_not_finite_where_one_gradient_is_not(value: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1000)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    assert parameters[1].grad is not None
    parameters[1].grad[500] = value
    assert not math.isfinite(float(gradient_norm(parameters)))


# --- averages


def test_averages_follow_their_recursion() -> None:
    model, decays = torch.nn.Linear(3, 2), (0.9, 0.5, 0.0)
    model.register_buffer("fixed", torch.ones(2))
    ema = EMA(model, decays)
    expected = [{name: value.clone() for name, value in model.state_dict().items()} for _ in decays]
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        for decay, average in zip(decays, expected, strict=True):
            for name, value in model.state_dict().items():
                average[name] = decay * average[name] + (1 - decay) * value
    for average, wanted in zip(ema.averages, expected, strict=True):
        assert average.keys() == wanted.keys()
        assert all(torch.allclose(average[name], wanted[name], rtol=1e-5, atol=1e-7) for name in wanted)
    assert torch.equal(ema.averages[2]["weight"], model.weight)
    assert torch.equal(ema.averages[0]["fixed"], torch.ones(2))


def test_averages_are_float32_whatever_the_model_is() -> None:
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    ema = EMA(model, (0.9999,))
    with torch.no_grad():
        model.weight.add_(1.0)
    before = ema.averages[0]["weight"].clone()
    ema.update()
    assert ema.averages[0]["weight"].dtype == torch.float32
    assert not torch.equal(ema.averages[0]["weight"], before)  # in bfloat16 such a step would be lost


def test_averages_are_taken_over_by_value_and_by_name() -> None:
    model = torch.nn.Linear(3, 2)
    ema, other = EMA(model, (0.9, 0.5)), EMA(torch.nn.Linear(3, 2), (0.9, 0.5))
    kept = [{name: value.clone() for name, value in average.items()} for average in other.averages]
    ema.load(other.averages)
    other.averages[0]["weight"].zero_()
    assert all(torch.equal(ema.averages[k][name], kept[k][name]) for k in range(2) for name in kept[k])
    with pytest.raises(KeyError):
        ema.load([{"weight": kept[0]["weight"]}] * 2)
    with pytest.raises(ValueError, match="shorter"):
        ema.load(kept[:1])


@pytest.mark.parametrize("decays", [(0.9, 0.99, 0.999), (0.9, 0.9999991, 0.9999992), (0.5, 0.9999999, 1e-9)])
def test_every_average_has_a_file_of_its_own(decays: tuple[float, ...]) -> None:
    files = ema_files(TrainConfig(ema_decay=decays))
    assert files[0] == "ema.safetensors"
    assert len(set(files)) == len(decays), files
    assert "ema-1.safetensors" not in files


# --- losses


def drawn_losses(rng: np.random.Generator, passes: int, batch: int) -> tuple[np.ndarray, ...]:
    mse, vb = rng.random((2, passes, batch))
    return mse, vb / 100, rng.integers(0, 1000, batch), rng.random(batch) + 0.1


@pytest.mark.parametrize("passes", [1, 2])
def test_losses_by_name_are_what_their_names_say(passes: int) -> None:
    """Against loops over the samples."""
    rng = np.random.default_rng(passes)
    for batch in (1, 3, 16, 64):
        mse, vb, timesteps, weights = drawn_losses(rng, passes, batch)
        losses = named_losses({"mse": mse, "vb": vb}, timesteps // 250, weights)

        def mean(values: list[float], batch: int = batch) -> float:
            return sum(values) / batch

        full = mean([(mse[0, i] + vb[0, i]) * weights[i] for i in range(batch)])
        assert losses["loss_full"] == pytest.approx(full, rel=1e-12)
        assert losses["mse"] == pytest.approx(mean([mse[0, i] * weights[i] for i in range(batch)]), rel=1e-12)
        assert losses["vb"] == pytest.approx(mean([vb[0, i] * weights[i] for i in range(batch)]), rel=1e-12)
        if passes == 2:
            masked = mean([(mse[1, i] + vb[1, i]) * weights[i] for i in range(batch)])
            assert losses["loss_masked"] == pytest.approx(masked, rel=1e-12)
            assert losses["loss"] == pytest.approx(full + masked, rel=1e-12)
        else:
            assert "loss_masked" not in losses
            assert losses["loss"] == losses["loss_full"]
        for quartile in range(4):
            inside = [i for i in range(batch) if 250 * quartile <= timesteps[i] < 250 * (quartile + 1)]
            name = f"loss_t{quartile}"
            assert (name in losses) == bool(inside)
            if inside:
                weighted = sum((mse[0, i] + vb[0, i]) * weights[i] for i in inside)
                assert losses[name] == pytest.approx(weighted / sum(weights[i] for i in inside), rel=1e-12)


def test_quartiles_join_to_the_full_loss() -> None:
    """Each weighted by the importance that its timesteps have, they are the full loss."""
    mse, vb, timesteps, weights = drawn_losses(np.random.default_rng(7), 2, 64)
    losses = named_losses({"mse": mse, "vb": vb}, timesteps // 250, weights)
    parts = [
        losses[f"loss_t{q}"] * weights[timesteps // 250 == q].sum() for q in range(4) if (timesteps // 250 == q).any()
    ]
    assert sum(parts) / 64 == pytest.approx(losses["loss_full"], rel=1e-12)


@pytest.mark.parametrize("num_timesteps", [1, 3, 10, 1000])
def test_every_timestep_is_in_one_quartile(num_timesteps: int) -> None:
    for timestep in range(num_timesteps):
        one = np.ones((1, 1))
        quartile = objective_of("epsilon").parts(np.array([timestep]), QUARTILES, num_timesteps)
        losses = named_losses({"mse": one, "vb": one}, quartile, np.ones(1))
        assert [name for name in losses if name.startswith("loss_t")] == [f"loss_t{timestep * 4 // num_timesteps}"]


def test_a_row_is_the_mean_of_its_steps() -> None:
    history = History()
    history.add({"loss": 1.0, "loss_t0": 4.0})
    history.add({"loss": 3.0})
    row = history.close_row(2, 0.5)
    assert row == {"step": 2.0, "lr": 0.5, "loss": 2.0, "loss_t0": 4.0}  # of the steps that have it
    history.add({"loss": 7.0})
    assert history.close_row(3, 0.25)["loss"] == 7.0
    assert [one["step"] for one in history.rows] == [2.0, 3.0]


def test_the_score_is_the_mean_since_it_was_taken() -> None:
    history = History()
    assert history.take_score() is None
    history.add({"loss": 1.0})
    history.close_row(1, 0.1)  # a row does not end it
    history.add({"loss": 2.0})
    assert history.take_score() == 1.5
    assert history.take_score() is None
    history.add({"loss": 5.0})
    assert history.take_score() == 5.0


def test_a_history_s_state_is_json_and_a_copy() -> None:
    history = History()
    for loss in (1.0, 1 / 3):
        history.add({"loss": loss})
    history.close_row(2, 1e-3)
    history.add({"loss": 0.1})
    state = history.state()
    text = json.dumps(state)
    history.add({"loss": 9.0})
    history.close_row(4, 1e-3)
    assert json.dumps(state) == text
    restored = History.restored(json.loads(text))
    assert restored == History.restored(state)
    restored.add({"loss": 9.0})
    restored.close_row(4, 1e-3)
    assert restored == history


# --- times


class _Clock:
    """A clock that goes on when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(meters, "time", clock)
    return clock


def metered(clock: _Clock, meter: Meter, waits: list[float], works: list[float]) -> None:
    for wait, work in zip(waits, works, strict=True):
        with meter.waiting():
            clock.now += wait
        clock.now += work
        assert meter.step_done() == pytest.approx(wait + work)


def test_a_row_of_figures_is_of_the_steps_since_the_last(clock: _Clock) -> None:
    meter = Meter(16, CPU, flops_per_image=1e6, peak_flops=1e8, datasheet_flops=2e8)
    assert meter.row() == {}
    clock.now += 1000
    meter.begin()
    for unit in (1.0, 2.0):
        metered(clock, meter, [unit, 0.0, 0.0, 0.0], [unit, unit, unit, 4 * unit])
        row = meter.row()
        assert row["images_per_s"] == pytest.approx(4 * 16 / (8 * unit))
        assert row["data_wait_share"] == pytest.approx(1 / 8)
        assert row["step_time_p50_s"] == pytest.approx(1.5 * unit)
        assert row["step_time_p95_s"] == pytest.approx(np.percentile([2, 1, 1, 4], 95) * unit)
        assert row["mfu_measured"] == pytest.approx(row["images_per_s"] / 100)
        assert row["mfu_datasheet"] == pytest.approx(row["images_per_s"] / 200)
        assert row["device_memory_mib"] > 1
        assert meter.row() == {}


def test_a_card_without_a_data_sheet_has_the_measured_figure_alone(clock: _Clock) -> None:
    meter = Meter(16, CPU, 1.0, 1.0)
    metered(clock, meter, [0.0], [1.0])
    assert [name for name in meter.row() if name.startswith("mfu")] == ["mfu_measured"]
    assert meters.datasheet_rate(CPU, "bf16") is None


@pytest.mark.parametrize(
    ("card", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.5, 67),
        ("NVIDIA H100 PCIe", 756.5, 51),
        ("NVIDIA H100 NVL", 835.5, 60),
        ("NVIDIA H200", 989.5, 67),
        ("NVIDIA H200 NVL", 835.5, 60),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA H20", None, None),
        ("NVIDIA L40", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA GeForce RTX 5090", None, None),
    ],
)
def test_the_peak_of_a_card_is_that_of_its_data_sheet(card: str, bf16: float | None, fp32: float | None) -> None:
    for precision, expected in (("bf16", bf16), ("fp32", fp32)):
        found = meters.datasheet_rate_of(card, precision)
        assert found is None if expected is None else found == pytest.approx(expected * 1e12)


def test_a_step_that_was_not_finished_is_not_counted(clock: _Clock) -> None:
    """One whose loss was not finite: neither its time nor what was waited for it."""
    meter = Meter(16, CPU, 1.0, 1.0)
    meter.begin()
    with meter.waiting():
        clock.now += 50
    clock.now += 7
    meter.begin()  # rolled back
    metered(clock, meter, [1.0], [3.0])
    row = meter.row()
    assert row["images_per_s"] == pytest.approx(4.0)
    assert row["data_wait_share"] == pytest.approx(0.25)


def test_the_machine_is_measured() -> None:
    assert matmul_rate(CPU, "fp32", seconds=0.01) > 1e6
    assert device_memory(CPU) > 50 << 20

"""Distillation: what a student learns is its teacher's map, by closed forms, the authors' code, and trainings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edt_core.config import ChainConfig, DistillConfig, TrainConfig, result_fields
from edt_core.data.latents import LatentDataset
from edt_core.diffusion import Objective, SamplerChoice, Schedule, guided, objective_of, with_objective
from edt_core.errors import UserError
from edt_core.models import ModelConfig, count_macs, shadow
from edt_core.sampling.sampler import LatentSampler
from edt_core.training.context import LocalContext
from edt_core.training.distill.teacher import Teacher, training_times
from edt_core.training.loop import TrainState, train
from edt_core.training.ranks import Ranks
from edt_core.training.start.initial import initial_checkpoint
from edt_core.training.start.trainable import step_flops
from edt_core.training.state import initial_state
from tests.edt_core.test_training_start import NAMES, base_of
from tests.support.cases import suite_of
from tests.support.golden import GOLDEN
from tests.support.models import BESIDE_EDT, shallow_config
from tests.support.trainings import OneOfOne, contents, cut_back, narrow, place, same

pytestmark = pytest.mark.usefixtures("quickly", "one_thread")

SAMPLERS = {"epsilon": "ddim", "v_prediction": "ddim", "flow": "euler"}
PLAIN: dict[str, Any] = {"masked_loss": False, "min_snr_gamma": None, "timestep_sampler": "uniform"}
MEAN, SPREAD = 0.7, 0.4  # of the Gaussian whose exact denoiser is known


def chain(objective: str, steps: int, **fields: Any) -> ChainConfig:
    return ChainConfig(sampler=SAMPLERS[objective], num_sampling_steps=steps, **fields)


def recipe(objective: str, steps: int = 4, parts: int = 2, **fields: Any) -> TrainConfig:
    own = {name: fields.pop(name) for name in list(fields) if name in ChainConfig.model_fields and name != "precision"}
    distill = DistillConfig(steps=steps, teacher=chain(objective, steps * parts, **own))
    usual: dict[str, Any] = {"model": "EDT-Tiny/2", "global_batch_size": 8, "max_steps": 4, "lr": 2e-3, "log_every": 1}
    usual |= {"checkpoint_every": 2, "ema_decay": 0.9, "class_dropout_prob": 0.0, "objective": objective}
    return TrainConfig(**PLAIN, **usual | fields, distill=distill)


def teacher(config: TrainConfig, shape: ModelConfig | None = None) -> Teacher:
    shape = shape or with_objective(narrow(), config.objective)
    return Teacher(config, shape, base_of(shape).weights, torch.device("cpu"))


class Exact(nn.Module):
    """The exact prediction for latents that are all drawn from N(MEAN, SPREAD^2), at any time, in float64."""

    def __init__(self, objective: str, config: ModelConfig) -> None:
        super().__init__()
        self.objective, self.config = objective, config

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        signal, noise = scales(self.objective, t)
        variance = signal**2 * SPREAD**2 + noise**2
        x_start = MEAN + signal * SPREAD**2 / variance * (x.double() - signal * MEAN)
        eps = (x.double() - signal * x_start) / noise.clamp(min=1e-12)
        values = {"epsilon": eps, "v_prediction": signal * eps - noise * x_start, "flow": x_start - eps}
        value = values[self.objective].float()
        return value if self.objective == "flow" else torch.cat([value, torch.zeros_like(value)], dim=1)


def scales(objective: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise of x_t at times t, float64 [N, 1, 1, 1]; -1 is the data of a noise schedule."""
    if objective == "flow":
        signal = t.double().view(-1, 1, 1, 1)
        return signal, 1 - signal
    betas = np.linspace(1e-4, 0.02, 1000)
    table = torch.from_numpy(np.append(np.cumprod(1 - betas), 1.0))  # the last one is index -1
    share = table[t].view(-1, 1, 1, 1)
    return share.sqrt(), (1 - share).sqrt()


def exact_teacher(objective: str, parts: int) -> tuple[Teacher, Tensor, Tensor, Tensor]:
    """A teacher with the exact predictions; the beginnings and ends of the student's steps, and x_t at the former."""
    config = recipe(objective, parts=parts)
    made = teacher(config)
    made.model = Exact(objective, made.model.config)  # type: ignore[assignment]
    begin, end = made._times[:, 0].repeat(3), made._times[:, -1].repeat(3)
    signal, noise = scales(objective, begin)
    draw = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x_t = signal * (MEAN + SPREAD * draw) + noise * torch.randn(draw.shape, generator=torch.Generator().manual_seed(2))
    return made, begin, end, x_t.float()


def gaussian_step(objective: str, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One deterministic step of the exact model from t to s by its definition: x_0 and noise, noised to s."""
    value = Exact(objective, narrow())(x, t, t).double()[:, :4]
    (a, b), (c, d) = scales(objective, t), scales(objective, s)
    if objective == "flow":
        return x + (s - t).double().view(-1, 1, 1, 1) * value
    x_start = a * x - b * value if objective == "v_prediction" else (x - b * value) / a
    eps = b * x + a * value if objective == "v_prediction" else value
    return c * x_start + d * eps


@pytest.mark.parametrize("objective", SAMPLERS)
def test_the_target_leads_in_one_step_where_two_steps_of_the_exact_denoiser_lead(objective: str) -> None:
    made, begin, end, x_t = exact_teacher(objective, parts=2)
    target = made.target(schedule_of(objective), x_t, begin, torch.zeros(12, dtype=torch.int64))
    middle = made._times[:, 1].repeat(3)
    expected = gaussian_step(objective, gaussian_step(objective, x_t.double(), begin, middle), middle, end)
    reached = made.objective.leap(schedule_of(objective), begin, end).end(x_t, target)
    assert float((reached.double() - expected).abs().max()) < 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize("objective", SAMPLERS)
def test_many_parts_reach_the_exact_map_of_the_flow(objective: str) -> None:
    """Of a Gaussian, the probability flow maps quantiles to quantiles; the error falls with the length of the parts."""
    errors = []
    for parts in (1, 8, 64):
        made, begin, end, x_t = exact_teacher(objective, parts)
        target = made.target(schedule_of(objective), x_t, begin, torch.zeros(12, dtype=torch.int64))
        reached = made.objective.leap(schedule_of(objective), begin, end).end(x_t, target).double()
        (a, b), (c, d) = scales(objective, begin), scales(objective, end)
        ratio = ((c * SPREAD) ** 2 + d**2).sqrt() / ((a * SPREAD) ** 2 + b**2).sqrt()
        errors.append(float((reached - (c * MEAN + ratio * (x_t.double() - a * MEAN))).abs().max()))
    assert errors[2] < errors[1] / 4 < errors[0] / 8
    assert errors[2] < 0.05


def schedule_of(objective: str) -> Schedule | None:
    return objective_of(objective).schedule(1000)


@pytest.mark.parametrize("objective", SAMPLERS)
@pytest.mark.parametrize("steps", [2, 4, 7])
def test_its_steps_are_those_of_the_sampler(objective: str, steps: int) -> None:
    """A student is sampled at the times at which it was trained, by the steps that it learnt."""
    model, shape = Exact(objective, narrow()), (3, 4, 8, 8)
    made = objective_of(objective)
    shift = 1.7 if objective == "flow" else 1.0
    choice, seen = SamplerChoice(SAMPLERS[objective], shift), []
    start = torch.randn(shape, generator=torch.Generator().manual_seed(3))

    def call(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return model(x, t, t)

    expected = made.chain(1000, choice, steps).run(call, start, None, None)
    times = torch.from_numpy(made.leap_times(1000, choice, steps, parts=1))
    assert times[:, 0].tolist() == seen
    x = start
    for begin, end in times.tolist():
        t, s = (torch.full((3,), time, dtype=times.dtype) for time in (begin, end))
        x = made.leap(schedule_of(objective), t, s).end(x, made.split(model(x, t, t), 4).value)
    assert torch.allclose(x, expected, rtol=0, atol=3e-4)  # from pure noise, epsilon is amplified 160 times
    fine = made.leap_times(1000, choice, steps, parts=3)
    assert fine[:, [0, -1]].tolist() == times.tolist()
    assert (np.diff(fine.astype(np.float64), axis=1) * (1 if objective == "flow" else -1) >= 0).all()
    assert fine[:, :-1].min() >= 0


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction"])
def test_targets_and_losses_are_those_of_the_authors_code(objective: str) -> None:
    golden = np.load(GOLDEN / "progressive_distillation.npz")
    made = teacher(recipe(objective, steps=4, parts=2))
    snr = torch.from_numpy(np.log(schedule_of(objective).coefficients[2])).float()  # type: ignore[union-attr]

    class Formula(nn.Module):
        config = made.model.config

        def forward(self, x: Tensor, t: Tensor, y: Tensor, amplitude: float = 0.5) -> Tensor:
            value = amplitude * torch.sin(2 * x) + 0.2 * torch.cos(snr[t]).view(-1, 1, 1, 1) + 0.3 * x
            return torch.cat([value, torch.zeros_like(value)], dim=1)

    made.model = Formula()  # type: ignore[assignment]
    z, t = torch.from_numpy(golden["z"]), torch.from_numpy(golden["t"])
    labels = torch.zeros(len(t), dtype=torch.int64)
    target = made.target(schedule_of(objective), z, t, labels)
    student = Formula()(z, t, labels, amplitude=0.4)
    losses = made.losses(schedule_of(objective), student, target, t)["mse"]
    c = schedule_of(objective).gather(t, 4)  # type: ignore[union-attr]
    x_target = made.objective.x_start(target, z, c)  # type: ignore[attr-defined]
    expected = golden[f"{objective}_x"]
    assert float(np.abs(x_target.numpy() - expected).max()) < 1e-5 * np.abs(expected).max()
    assert losses.numpy() == pytest.approx(golden[f"{objective}_loss"], rel=1e-5)


def test_the_teacher_is_guided_as_it_is_sampled() -> None:
    """Guidance in an interval, of growing strength, and AMM: each sample at its own time as in a chain of its own."""
    shape = with_objective(narrow(), "flow")
    fields = {"cfg_scale": 2.0, "guidance_interval": (0.2, 0.6), "cfg_power": 2.0, "guidance_channels": None}
    config = recipe("flow", steps=4, parts=2, amm_blocks=(1,), **fields)
    made = teacher(config, shape)
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    labels, times = torch.tensor([0, 1, 2, 3]), made._times[:, 0]
    assert times.tolist() == [0.0, 0.25, 0.5, 0.75]
    targets = made.target(None, x, times, labels)
    sampler = LatentSampler(made.model, config.distill.teacher, 1000)  # type: ignore[union-attr]
    for row in range(4):
        own = labels[row : row + 1]
        model = guided(made.model, own, 4, 2.0, None, interval=(0.2, 0.6), growth=sampler.growth)
        alone = x[row : row + 1]
        for begin, end in pairwise(made._times[row].tolist()):
            value = model.at(begin)(alone, torch.full((1,), begin))  # type: ignore[union-attr]
            alone = alone + (end - begin) * value
        assert torch.allclose((alone - x[row]) / 0.25, targets[row], rtol=0, atol=2e-5)
    plain = teacher(recipe("flow", steps=4, parts=2, **fields), shape).target(None, x, times, labels)
    assert not torch.allclose(plain, targets, atol=1e-4), "AMM has an effect"


def fit(folder: Path, dataset: LatentDataset, config: TrainConfig, shape: ModelConfig, **more: Any) -> TrainState:
    context = more.pop("context", None) or LocalContext(folder, more.pop("ranks", None) or Ranks())
    return train(config, shape, dataset, context, start_of(config, shape))


def start_of(config: TrainConfig, shape: ModelConfig) -> Callable[[], Any]:
    return lambda: initial_checkpoint(config, shape, base_of(shape), NAMES)[0]


def losses_of(state: TrainState) -> list[float]:
    return [row["loss"] for row in state.history.rows]


def test_a_student_of_its_teacher_s_own_steps_has_nothing_to_learn(dataset: LatentDataset, tmp_path: Path) -> None:
    """One part in a step, no guidance: the first loss is that of rounding alone; with guidance it is not."""
    shape = with_objective(narrow(), "flow")
    first = losses_of(fit(tmp_path / "a", dataset, recipe("flow", parts=1, max_steps=1), shape))
    guided_first = losses_of(fit(tmp_path / "b", dataset, recipe("flow", parts=1, max_steps=1, cfg_scale=3.0), shape))
    assert first[0] < 1e-9
    assert guided_first[0] > 1e-6


OPTIONS: list[dict[str, Any]] = [
    {"objective": "flow", "cfg_scale": 2.0, "guidance_interval": (0.1, 0.9), "micro_batch_size": 3},
    {"objective": "v_prediction", "optimizer": "muon", "precision": "bf16", "cfg_scale": 1.5, "amm_blocks": (1, 2)},
    {"objective": "epsilon", "micro_batch_size": 3, "optimizer": "adamw", "amm_blocks": (1, 2)},
]


@pytest.mark.parametrize("options", suite_of(OPTIONS[:2], OPTIONS), ids=str)
def test_it_learns_and_resumes_bit_for_bit(options: dict[str, Any], dataset: LatentDataset, tmp_path: Path) -> None:
    """The teacher is read again where a training resumes, and is not in its checkpoints."""
    config = recipe(**options)
    shape = with_objective(narrow(), config.objective)
    whole = fit(tmp_path / "a", dataset, config, shape)
    fit(tmp_path / "b", dataset, config, shape, context=cut_back(tmp_path / "a", tmp_path / "b", 2))
    assert contents(place(tmp_path / "a", 4)) == contents(place(tmp_path / "b", 4))
    assert set(contents(place(tmp_path / "a", 4))) >= {"model.safetensors", "ema.safetensors"}
    longer = losses_of(fit(tmp_path / "c", dataset, config.model_copy(update={"max_steps": 16}), shape))
    assert sum(longer[-4:]) < 0.9 * sum(longer[:4])
    for row in whole.history.rows:
        assert row["loss"] == row["mse"] > 0
        assert "vb" not in row


@pytest.mark.parametrize("name", suite_of(["DiT-Tiny/2"], BESIDE_EDT[:3]))
def test_every_family_is_distilled(name: str, dataset: LatentDataset, tmp_path: Path) -> None:
    shape = with_objective(shallow_config(name), "flow")
    state = fit(tmp_path, dataset, recipe("flow", model=name, cfg_scale=2.0, max_steps=12, checkpoint_every=12), shape)
    assert sum(losses_of(state)[-3:]) < sum(losses_of(state)[:3])


def test_each_row_has_its_own_target() -> None:
    """So a rank, and a micro-batch, computes what the whole batch would."""
    made = teacher(recipe("flow", cfg_scale=2.0))
    x, labels = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(5)), torch.arange(6) % 4
    times = made._times[:, 0][torch.tensor([3, 0, 1, 1, 2, 0])]
    both = made.target(None, x, times, labels)
    parts = [made.target(None, x[rows], times[rows], labels[rows]) for rows in (slice(0, 4), slice(4, 6))]
    assert torch.allclose(torch.cat(parts), both, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("group_of_one")
def test_an_exchange_of_gradients_takes_every_parameter(dataset: LatentDataset, tmp_path: Path) -> None:
    """DDP waits for the gradient of each: also of the variance, which a student does not learn."""
    config = recipe("epsilon", max_steps=2)
    state = fit(tmp_path / "a", dataset, config, narrow(), ranks=OneOfOne())
    assert same(state.model.state_dict(), fit(tmp_path / "b", dataset, config, narrow()).model.state_dict())


def test_times_are_drawn_from_the_student_s_alone() -> None:
    sampler = training_times(recipe("epsilon", steps=4))
    draw = sampler.draw(np.linspace(0, 1, 8, endpoint=False))
    assert draw.timesteps.tolist() == [999, 999, 666, 666, 333, 333, 0, 0]
    assert draw.weights.tolist() == [1.0] * 8
    assert sampler.state_dict() == {}
    state = initial_state(recipe("flow"), with_objective(narrow(), "flow"))
    assert state.timesteps.draw(np.array([0.0, 0.99])).timesteps.tolist() == [0.0, 0.75]


def test_the_teacher_s_operations_are_counted() -> None:
    macs = count_macs(shadow(narrow()))
    learning = step_flops(recipe("epsilon", parts=1), narrow()) - 2 * macs
    assert step_flops(recipe("epsilon", parts=3), narrow()) - learning == 6 * macs
    assert step_flops(recipe("epsilon", parts=3, cfg_scale=1.5), narrow()) - learning == 12 * macs


def test_what_cannot_be_distilled_is_refused() -> None:
    def refused(message: str, make: Callable[[], object]) -> None:
        with pytest.raises((UserError, ValueError), match=message):
            make()

    refused(
        r"is 10, which is no multiple .* 4 steps .*; set it to 12",
        lambda: DistillConfig(steps=4, teacher=chain("flow", 10)),
    )
    masked = {**recipe("flow").model_dump(), "masked_loss": True}
    refused(r"masked_loss is True, but distill is set.*masked_loss=false", lambda: TrainConfig(**masked))
    snr = {**recipe("epsilon").model_dump(), "min_snr_gamma": 5.0}
    refused(r"min_snr_gamma is 5\.0, but distill is set.*=null", lambda: TrainConfig(**snr))
    cached = {"steps": 2, "teacher": {"sampler": "euler", "num_sampling_steps": 4, "cache": {"kind": "delta"}}}
    refused("distill.teacher.cache is set", lambda: DistillConfig(**cached))
    times: Callable[[Objective, str], object] = lambda objective, name: objective.leap_times(  # noqa: E731
        1000, SamplerChoice(name), 4, 2
    )
    refused("only a step of euler is one call", partial(times, objective_of("flow"), "heun"))
    refused("only ddim is deterministic", partial(times, objective_of("epsilon"), "ancestral"))
    refused("has no deterministic sampler", partial(times, objective_of("masked_tokens"), "halton"))
    many = partial(objective_of("epsilon").leap_times, 1000, SamplerChoice("ddim"), 4, 251)
    refused("is 1004, more than the 1000 timesteps", many)


def test_a_training_without_a_teacher_is_refused(dataset: LatentDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no teacher: set train\.init_from"):
        train(recipe("epsilon"), narrow(), dataset, LocalContext(tmp_path))


def test_how_the_teacher_is_measured_changes_no_training() -> None:
    config = recipe("flow")
    assert config.distill is not None
    measured = config.distill.model_copy(update={"protocol": chain("flow", 25)})
    assert result_fields(config) == result_fields(config.model_copy(update={"distill": measured}))
    fields = result_fields(config)["distill"]
    assert set(fields) == {"steps", "teacher"}
    assert "cache" not in fields["teacher"], "what a chain gets later is absent at its default"
    assert "distill" not in result_fields(TrainConfig())

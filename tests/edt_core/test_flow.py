"""Flow matching against numbers computed with SiT's code (`made` in sit_manifest.json says how), and what is known.

The released files have DiT's keys; those that say what they are, or are called so, are read.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from edt_core.config import ChainConfig, TrainConfig, result_fields
from edt_core.data.latents import LatentDataset
from edt_core.diffusion import (
    OBJECTIVES,
    Objective,
    SampleNoise,
    SamplerChoice,
    check_training,
    guided,
    objective_of,
    objective_of_model,
    objective_words,
    sample,
    with_objective,
)
from edt_core.diffusion.flow_chains import ode_times, sde_times
from edt_core.diffusion.schedule import linear_schedule
from edt_core.diffusion.timesteps import logit_normal
from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer, model_config, read_released_model
from edt_core.sampling.sampler import LatentSampler
from edt_core.training.context import LocalContext
from edt_core.training.loop import train
from edt_core.training.state import initial_model
from jobs.models.open import load_model
from pipelines.config.schema import PipelineConfig, load_config, recorded_yaml
from tests.support.golden import GOLDEN, formula_weight, relative_error
from tests.support.models import TINY
from tests.support.trainings import cut_back, narrow, same

FLOW = objective_of("flow")
LABELS = torch.tensor([0, 3, 7, 9])
SIT_OPTIONS = argparse.Namespace(
    model="SiT-XL/2", prediction="velocity", path_type="Linear", loss_weight=None, sample_eps=None, train_eps=None
)


def draw(seed: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(4, 4, 8, 8).astype(np.float32))


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "sit.npz") as file:
        return dict(file)


def sit_state() -> dict[str, Tensor]:
    """The weights of the reference: a SiT has the keys of a DiT, and never trains the second half of its output."""
    plain = initial_model(model_config("DiT-Tiny/2", 32, 10), 0).state_dict()
    state = {k: v if k == "pos_embed" else formula_weight(k, v.shape) for k, v in plain.items()}
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[key].unflatten(0, (-1, 2, 4))[:, 1] = 0
    return state


@pytest.fixture(scope="module")
def sit(tmp_path_factory: pytest.TempPathFactory) -> DiffusionTransformer:
    """The reference, imported."""
    path = tmp_path_factory.mktemp("sit") / "0400000.pt"
    torch.save({"ema": sit_state(), "args": SIT_OPTIONS}, path)
    return read_released_model(path, words=objective_words()).model


# --- against SiT


@torch.no_grad()
def test_an_imported_sit_has_the_loss_of_its_authors(sit: DiffusionTransformer, golden: dict[str, np.ndarray]) -> None:
    data, noise, t = draw(0), draw(1), torch.from_numpy(golden["t"])
    x_t = FLOW.noised(None, data, t, noise)
    assert relative_error(x_t, golden["x_t"]) < 1e-6
    output = sit(x_t, t, torch.tensor([0, 3, 7, 10]))
    assert relative_error(output, golden["velocity"]) < 1e-5
    losses = FLOW.losses(None, torch.from_numpy(golden["velocity"]), data, x_t, noise, t, min_snr_gamma=None)
    np.testing.assert_allclose(losses.loss.numpy(), golden["loss"], rtol=1e-6)
    own = FLOW.losses(None, output, data, x_t, noise, t, min_snr_gamma=None)
    np.testing.assert_allclose(own["mse"].numpy(), golden["loss"], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "sampler", "steps", "options"),
    [
        ("euler", "euler", 8, {}),
        ("heun", "heun", 8, {}),
        ("sde", "sde", 20, {}),
        ("sde_sbdm", "sde", 20, {"sde_diffusion": "sbdm"}),
        ("euler_guided", "euler", 8, {}),
    ],
)
def test_chains_are_those_of_sit(
    name: str,
    sampler: str,
    steps: int,
    options: dict[str, Any],
    sit: DiffusionTransformer,
    golden: dict[str, np.ndarray],
) -> None:
    chain = FLOW.chain(1000, SamplerChoice(sampler, **options), steps)
    model = guided(sit, LABELS, 10, 1.5 if name.endswith("guided") else 1.0)
    made = chain.run(model, draw(1), lambda step: draw(100 + step), None)
    assert relative_error(made, golden[name]) < 1e-5


def test_the_steps_of_the_sde_are_the_published_ones() -> None:
    times = sde_times(250)
    assert len(times) == 251
    np.testing.assert_allclose(np.diff(times), [0.96 / 249] * 249 + [0.04], rtol=1e-9)
    assert (times[0], times[-1]) == (0.0, 1.0)


# --- what is known in closed form

MEAN = torch.tensor([0.7, -0.4])
COVARIANCE = torch.tensor([[0.5, 0.3], [0.3, 0.4]])


def gaussian_velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[data - noise | x_t] for data N(MEAN, COVARIANCE), x [N, 2, 1, 1]."""
    time = float(t[0])
    spread = time**2 * COVARIANCE + (1 - time) ** 2 * torch.eye(2)
    whitened = torch.linalg.solve(spread, (x.flatten(1) - time * MEAN).T)
    data = MEAN[:, None] + time * COVARIANCE @ whitened
    return (data - (1 - time) * whitened).T.reshape(x.shape)


@pytest.mark.parametrize(
    ("sampler", "options"), [("euler", {}), ("heun", {}), ("sde", {}), ("sde", {"sde_diffusion": "sbdm"})], ids=str
)
def test_the_exact_velocity_of_a_gaussian_leads_to_its_mean_and_covariance(
    sampler: str, options: dict[str, Any]
) -> None:
    random = torch.Generator().manual_seed(0)
    start = torch.randn(40_000, 2, 1, 1, generator=random)
    chain = FLOW.chain(1000, SamplerChoice(sampler, **options), 200)
    samples = chain.run(gaussian_velocity, start, lambda _: torch.randn(start.shape, generator=random), None)
    torch.testing.assert_close(samples.flatten(1).mean(0), MEAN, rtol=0, atol=0.02)
    torch.testing.assert_close(samples.flatten(1).T.cov(), COVARIANCE, rtol=0, atol=0.02)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_orders_of_convergence(sampler: str, order: int) -> None:
    """The flow of a Gaussian N(m, s²) takes noise z to m + s z."""
    start = torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    mean, std = 0.5, 0.4

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        time = float(t[0])
        variance = time**2 * std**2 + (1 - time) ** 2
        return mean + (time * std**2 - (1 - time)) / variance * (x - time * mean)

    def error(steps: int) -> float:
        made = FLOW.chain(1000, SamplerChoice(sampler), steps).run(velocity, start, None, None)
        return float((made - (mean + std * start)).abs().max())

    coarse, middle, fine = (error(steps) for steps in (16, 32, 64))
    assert np.log2(coarse / middle) == pytest.approx(order, abs=0.25)
    assert np.log2(middle / fine) == pytest.approx(order, abs=0.25)


# --- times


def test_times_are_uniform_or_logit_normal_and_shifted_towards_noise() -> None:
    uniforms = (np.arange(1000) + 0.5) / 1000
    plain = FLOW.times("uniform", 1000).draw(uniforms)
    np.testing.assert_allclose(plain.timesteps, uniforms, rtol=1e-6)
    assert plain.timesteps.dtype == np.float32
    assert (plain.weights == 1).all()
    normal = np.log(logit_normal(uniforms) / (1 - logit_normal(uniforms)))
    assert (normal.mean(), normal.std()) == pytest.approx((0, 1), abs=0.01)
    noise = 1 - uniforms
    shifted = FLOW.times("uniform", 1000, 3.0).draw(uniforms).timesteps
    np.testing.assert_allclose(1 - shifted, 3 * noise / (1 + 2 * noise), atol=1e-6)
    np.testing.assert_allclose(ode_times(4, 3.0), 1 - 3 * (n := np.linspace(1, 0, 5)) / (1 + 2 * n), atol=1e-12)
    assert FLOW.times("logit-normal", 1000).state_dict() == {}


@pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
def test_a_noise_schedule_has_logit_normal_timesteps_too(name: str) -> None:
    uniforms = (np.arange(10_000) + 0.5) / 10_000
    timesteps, weights = objective_of(name).times("logit-normal", 1000).draw(uniforms)
    assert timesteps.dtype == np.int64
    counts = np.bincount(timesteps // 250, minlength=4)  # of a normal number below log(1/3), 0 and log(3)
    np.testing.assert_allclose(counts / 10_000, [0.136, 0.364, 0.364, 0.136], atol=2e-3)
    assert (weights == 1).all()
    assert objective_of(name).times("logit-normal", 4).draw(np.array([0.0, 1 - 2**-53])).timesteps.tolist() == [0, 3]


def test_quarters_and_measured_times_are_from_the_least_noise() -> None:
    assert FLOW.measured_times(8, 1000).tolist() == [(15 - 2 * k) / 16 for k in range(8)]
    times = np.array([1.0, 0.76, 0.74, 0.4, 0.1, 0.0], np.float32)
    assert FLOW.parts(times, 4, 1000).tolist() == [0, 0, 1, 2, 3, 3]
    torch.testing.assert_close(FLOW.progress(torch.tensor([0.0, 1.0]), 1000), torch.tensor([0.0, 1.0]))


def test_a_step_is_guided_by_the_time_where_it_begins() -> None:
    """Both calls of a step of Heun are guided, or none; a guided call has twice the batch."""
    calls: list[tuple[float, int]] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append((round(float(t[0]), 6), len(x)))
        return torch.zeros_like(x)

    switched = guided(model, LABELS, 10, 2.0, interval=(0.25, 0.75))
    FLOW.chain(1000, SamplerChoice("heun"), 4).run(switched, draw(1), None, None)
    one, two = len(LABELS), 2 * len(LABELS)
    ends = [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1]
    assert calls == list(zip(ends, [one, one, two, two, two, two, one, one], strict=True))


# --- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_snr_gamma": 5.0}, "no weight by signal-to-noise ratio; set min_snr_gamma to null"),
        ({"timestep_sampler": "loss-second-moment"}, "set timestep_sampler to uniform or logit-normal"),
        ({"objective": "epsilon", "time_shift": 2.0}, "time_shift is 2, but the objective 'epsilon' has a noise sche"),
    ],
)
def test_recipes_that_an_objective_lacks(fields: dict[str, Any], message: str) -> None:
    usual = {"objective": "flow", "min_snr_gamma": None, "timestep_sampler": "uniform"}
    check_training(TrainConfig(**usual))
    with pytest.raises(UserError, match=message):
        check_training(TrainConfig(**{**usual, **fields}))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        *(("flow", {"sampler": other}, "by one of euler, heun, sde") for other in OBJECTIVES["epsilon"].samplers),
        *(("epsilon", {"sampler": other}, "by one of ancestral, ddim, dpmsolver") for other in FLOW.samplers),
        ("v_prediction", {"sampler": "euler"}, "by one of ancestral, ddim, dpmsolver"),
        ("flow", {"sampler": "euler", "sde_diffusion": "sbdm"}, "set it to sigma, or sampler to sde"),
        ("epsilon", {"time_shift": 2.0}, "set time_shift to 1"),
        ("epsilon", {"sde_diffusion": "sbdm"}, "only the sampler sde of flow matching"),
        (
            "flow",
            {"sampler": "euler", "cfg_scale": 2.0, "guidance_interval": (0.2, 500)},
            r"ends above 1, but the time of EDT-Tiny/2 is from 0 \(noise\) to 1 \(data\)",
        ),
        ("flow", {"sampler": "euler", "cfg_scale": 2.0, "guidance_interval": (100, 500)}, "begins after the last"),
    ],
)
def test_chains_that_an_objective_lacks(name: str, fields: dict[str, Any], message: str) -> None:
    model = initial_model(with_objective(narrow(), name), 0)
    with pytest.raises(UserError, match=message):
        LatentSampler(model, ChainConfig(num_sampling_steps=4, **fields), 1000)


def test_the_functions_of_the_objective_say_what_is_wrong() -> None:
    x = draw(0)
    with pytest.raises(UserError, match="needs a noise schedule, and a model of the objective 'flow' has none"):
        sample(lambda x, t: x, x, linear_schedule(), "ddim", objective=FLOW)
    with pytest.raises(ValueError, match=r"has shape \(4, 8, 8, 8\), but the velocity of 4-channel latents"):
        FLOW.split(torch.cat([x, x], 1), 4)
    with pytest.raises(ValueError, match="must have the same shape"):
        FLOW.losses(None, x, x, x, x[:1], torch.zeros(4), min_snr_gamma=None)
    with pytest.raises(UserError, match="use at least 2"):
        FLOW.chain(1000, SamplerChoice("euler"), 1)


# --- configuration


def test_a_pipeline_of_flow_matching_has_its_recipe_and_sampler() -> None:
    config = load_config("ablation", ["train.objective=flow"])
    assert (config.train.min_snr_gamma, config.train.timestep_sampler) == (None, "uniform")
    assert config.sample.sampler == "euler"
    name = next(iter(config.models))
    assert (config.model_of(name, 10).objective, config.model_of(name, 10).outputs) == ("flow", 1)
    again = PipelineConfig.model_validate(yaml.safe_load(recorded_yaml(config)))
    assert recorded_yaml(again) == recorded_yaml(config)


def test_each_model_has_the_defaults_of_its_own_objective() -> None:
    config = load_config("ablation", ["train.objective=flow", "models={a: {}}", "sample.sampler=heun"])
    assert config.sample.sampler == "heun"
    with pytest.raises(UserError, match=r"sampler is 'ancestral', but a model of the objective 'flow'"):
        load_config("ablation", ["models={a: {}, b: {objective: flow}}"])
    for assignment, message in (
        ("train.min_snr_gamma=5", "set min_snr_gamma to null"),
        ("train.timestep_sampler=loss-second-moment", "continuous"),
        ("sample.sampler=ddim", "by one of euler, heun, sde"),
    ):
        with pytest.raises(UserError, match=message):
            load_config("ablation", ["train.objective=flow", assignment])
    mixed = load_config("ablation", ["train.objective=flow", "models={a: {objective: v_prediction}}"])
    assert mixed.train_of("a").min_snr_gamma == TrainConfig().min_snr_gamma
    assert mixed.sample.sampler == "ancestral"


def test_at_their_defaults_the_new_fields_are_not_in_a_fingerprint() -> None:
    assert not {"time_shift"} & result_fields(TrainConfig()).keys()
    assert not {"time_shift", "sde_diffusion"} & result_fields(ChainConfig()).keys()


# --- training and sampling

CONFIG = TrainConfig(
    model="EDT-Tiny/2",
    objective="flow",
    timestep_sampler="logit-normal",
    time_shift=1.5,
    min_snr_gamma=None,
    global_batch_size=16,
    max_steps=45,
    lr=5e-3,
    ema_decay=0.9,
    log_every=15,
    checkpoint_every=40,
)


@pytest.fixture(scope="module")
def latents(latents_artifact: Any) -> LatentDataset:
    return LatentDataset(latents_artifact.paths("*.arrow"))


@pytest.mark.usefixtures("one_thread", "quickly")
def test_a_training_learns_and_resumes_exactly(latents: LatentDataset, tmp_path: Path) -> None:
    model = with_objective(narrow(), "flow")
    whole = train(CONFIG, model, latents, LocalContext(tmp_path / "whole", num_to_keep=9))
    rows = whole.history.rows
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert "vb" not in rows[0]
    assert rows[0]["mse"] == pytest.approx(rows[0]["loss_full"])
    assert {f"loss_t{quarter}" for quarter in range(4)} <= rows[-1].keys()
    resumed = train(CONFIG, model, latents, cut_back(tmp_path / "whole", tmp_path / "copy", 40))
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert resumed.history.rows == rows
    with pytest.raises(UserError, match=r"time_shift 1\.5 instead of"):
        train(
            CONFIG.model_copy(update={"time_shift": 1.0}),
            model,
            latents,
            cut_back(tmp_path / "whole", tmp_path / "b", 40),
        )


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("sampler", FLOW.samplers)
def test_every_family_is_sampled_with_guidance_and_modulated_attention(name: str, sampler: str) -> None:
    model = initial_model(with_objective(model_config(name, 32, 4), "flow"), 0)
    with torch.no_grad():  # the final layer starts at zero
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))

    def drawn(indices: list[int], **fields: Any) -> Tensor:
        chain = ChainConfig(sampler=sampler, num_sampling_steps=3, cfg_scale=1.5, cfg_power=2.0, **fields)
        return LatentSampler(model, chain, 1000)([1] * len(indices), 0, indices)

    plain = drawn([0, 1])
    assert plain.isfinite().all()
    assert not torch.equal(plain, drawn([0, 1], amm_blocks=(1,)))
    torch.testing.assert_close(plain[1:], drawn([1]), rtol=1e-4, atol=1e-5)  # a function of (seed, index)


# --- released files


def test_a_sit_is_read_by_its_options_or_its_name_and_cut_to_one_output(
    sit: DiffusionTransformer, tmp_path: Path
) -> None:
    assert objective_of_model(sit.config) is FLOW
    assert sit.state_dict()["final_layer.linear.weight"].shape == (16, 60)
    torch.save(sit_state(), tmp_path / "SiT-XL-2-256.pt")
    by_name = read_released_model(tmp_path / "SiT-XL-2-256.pt", words=objective_words())
    assert same(by_name.model.state_dict(), sit.state_dict())
    assert any("it is read as a SiT" in note for note in by_name.notes)
    torch.save(sit_state(), tmp_path / "a.pt")
    stated = read_released_model(tmp_path / "a.pt", words=objective_words(), objective="flow")
    assert same(stated.model.state_dict(), sit.state_dict())
    loaded = load_model(str(tmp_path / "SiT-XL-2-256.pt"))
    assert loaded.sampling["sampler"] == "euler"


def test_the_eps_of_a_sit_change_nothing(sit: DiffusionTransformer, tmp_path: Path) -> None:
    """The authors' code sets both to 0 for a velocity on the straight path."""
    stated = argparse.Namespace(**{**vars(SIT_OPTIONS), "train_eps": 0.001, "sample_eps": "0.01"})
    torch.save({"ema": sit_state(), "args": stated}, tmp_path / "a.pt")
    found = read_released_model(tmp_path / "a.pt", words=objective_words())
    assert same(found.model.state_dict(), sit.state_dict())
    ignored = {note.split(" ")[0] for note in found.notes if "was ignored, as SiT's code" in note}
    assert ignored == {"train_eps=0.001", "sample_eps=0.01"}


def test_no_file_is_taken_for_a_sit_or_a_dit_by_a_guess(tmp_path: Path) -> None:
    read = partial(read_released_model, words=objective_words())
    trained = {key: value + 0.1 for key, value in sit_state().items()}  # as a DiT trains its variance
    cases: list[tuple[str, dict[str, Any], str | None, str]] = [
        ("a.pt", {"ema": sit_state()}, None, "For a SiT import it with --objective flow"),
        ("SiT.pt", {"ema": trained}, None, "the output layer's rows for the variance were trained"),
        ("a.pt", {"ema": trained}, "flow", "the output layer's rows for the variance were trained"),
        ("a.pt", {"ema": trained, "args": {"prediction": "noise"}}, "flow", "its training options say epsilon"),
        ("a.pt", {"ema": sit_state(), "args": {"prediction": "velocity"}}, "epsilon", "options say flow"),
        ("a.pt", {"ema": sit_state(), "args": {"prediction": "velocity", "path_type": "GVP"}}, None, "straight one"),
        ("SiT.pt", {"ema": sit_state(), "args": {"prediction": "v", "path_type": "linear"}}, None, "continuous path"),
        ("a.pt", {"ema": sit_state(), "args": {"prediction": "score"}}, None, "prediction='score'"),
        ("a.pt", {"ema": sit_state()}, "velocity", "unknown objective 'velocity'"),
    ]
    for file, content, objective, message in cases:
        torch.save(content, tmp_path / file)
        with pytest.raises(UserError, match=message):
            read(tmp_path / file, objective=objective)
    torch.save({"ema": trained, "args": {"prediction": "velocity"}}, tmp_path / "b.pt")  # fine-tuned from a DiT
    assert read(tmp_path / "b.pt").model.config.outputs == 1


# --- noise


def test_the_sde_draws_noise_by_seed_and_index() -> None:
    chain = FLOW.chain(1000, SamplerChoice("sde"), 5)
    assert (chain.steps, chain.noises) == (5, 4)
    asked: list[int] = []
    source = SampleNoise(0, [3, 5], (4, 8, 8))

    def noise(step: int) -> Tensor:
        asked.append(step)
        return source(step)

    run: Callable[..., Tensor] = chain.run
    done: list[tuple[int, int]] = []
    run(lambda x, t: -x, source.initial(), noise, lambda *counts: done.append(counts))
    assert asked == [0, 1, 2, 3]
    assert done == [(step, 5) for step in range(1, 6)]
    for objective in OBJECTIVES.values():
        assert isinstance(objective, Objective)
        assert set(objective.samplers) <= set(ChainConfig.model_fields["sampler"].annotation.__args__)  # type: ignore[union-attr]

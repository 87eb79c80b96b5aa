"""Objectives: what they say of x_0 and noise, chains over them against diffusers, and where they are mixed up."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from edt_core.autoencoders.autoencoder import build_autoencoder, decode_to_pixels
from edt_core.config import AutoencoderConfig, ChainConfig, TrainConfig, result_fields
from edt_core.data.latents import LatentDataset
from edt_core.diffusion import (
    Objective,
    Schedule,
    linear_schedule,
    objective_of,
    objective_of_model,
    objective_words,
    respace,
    sample,
    with_objective,
)
from edt_core.diffusion.sampling import METHODS, SamplingMethod
from edt_core.diffusion.schedule import Spacing
from edt_core.diffusion.solvers import SolverName
from edt_core.errors import UserError
from edt_core.models import ModelConfig, create_model, read_released_model
from edt_core.models.training_options import TrainingOptions, check_objective
from edt_core.pipeline import EDTPipeline
from edt_core.sampling.diffusers_pipeline import save_pipeline
from edt_core.sampling.sampler import LatentSampler
from edt_core.sampling.schedulers import SUPPORTED
from edt_core.sampling.torch_export import save_program
from edt_core.store.folder import Folder
from edt_core.training.checkpoint import ema_model
from edt_core.training.context import LocalContext
from edt_core.training.loop import train
from edt_core.training.preview import Preview, grid
from edt_core.training.state import initial_model, initial_state
from jobs.models.open import load_model, open_model
from pipelines.config.schema import as_yaml, load_config, recorded_yaml
from pipelines.registry.model_card import ModelCard
from tests.support.models import drawn_weights
from tests.support.pipelines import quiet, small_pipeline
from tests.support.trainings import cut_back, narrow, place, same

V, EPSILON = objective_of("v_prediction"), objective_of("epsilon")
FULL, SHORT = linear_schedule(), linear_schedule(50)
MEAN, STD = 0.3, 0.5  # data is N(MEAN, STD²), every number on its own
START = torch.randn(16, 4, 2, 2, generator=torch.Generator().manual_seed(0))
LABELS = [3, 1, 0]


def without_signal(schedule: Schedule) -> Schedule:
    """A schedule whose last alpha_bar is 0: square roots shifted to 0 and scaled back (arXiv 2305.08891, alg. 1)."""
    root = np.sqrt(schedule.alphas_cumprod)
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    ab = root**2
    return Schedule(1.0 - ab / np.append(1.0, ab[:-1]), schedule.timestep_map)


def gaussian_model(objective: Objective, schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
    """What the best model of Gaussian data predicts, in closed form, and a variance between the bounds."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        ab = torch.from_numpy(schedule.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
        wide = x.double()
        x_start = MEAN + ab.sqrt() * STD**2 / (ab * STD**2 + 1 - ab) * (wide - ab.sqrt() * MEAN)
        noise = (wide - ab.sqrt() * x_start) / (1 - ab).sqrt()
        value = noise if objective is EPSILON else ab.sqrt() * noise - (1 - ab).sqrt() * x_start
        return torch.cat([value.float(), torch.tanh(x)], dim=1)

    return model


def chain(schedule: Schedule, method: SamplingMethod, steps: int, spacing: Spacing, objective: Objective = V) -> Tensor:
    random = torch.Generator().manual_seed(7)
    return sample(
        gaussian_model(objective, schedule),
        START,
        respace(schedule, steps, spacing),
        method,
        objective=objective,
        noise=lambda _: torch.randn(START.shape, generator=random),
    )


def chain_of_diffusers(name: str, schedule: Schedule, steps: int, objective: Objective, **config: Any) -> Tensor:
    """A scheduler of diffusers with exactly these noise levels: its own are computed in float32."""
    size = schedule.num_timesteps
    shared = {"num_train_timesteps": size, "beta_start": 0.1 / size, "beta_end": 20 / size, "beta_schedule": "linear"}
    scheduler = getattr(diffusers, name)(
        **shared, prediction_type=objective.prediction_type, timestep_spacing="trailing", **config
    )
    ab = torch.from_numpy(schedule.alphas_cumprod)
    own = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(own[:-1], ab[:-1], rtol=1e-3, atol=1e-6)
    if name.startswith(("DDIM", "DDPM")):
        scheduler.alphas_cumprod = ab
    else:
        scheduler.alphas_cumprod = torch.cat([ab[:-1], ab[-1:].clamp(min=2**-24)])
    scheduler.set_timesteps(steps)
    x, random, model = START, torch.Generator().manual_seed(7), gaussian_model(objective, schedule)
    for t in scheduler.timesteps:
        output = model(x, t.expand(len(x)))
        given = output if name == "DDPMScheduler" else output[:, :4]
        more = {"generator": random} if name == "DDPMScheduler" else {}
        x = scheduler.step(given, t, x, return_dict=False, **more)[0].float()
    return x


# --- what a value implies


@pytest.mark.parametrize("objective", [EPSILON, V], ids=["epsilon", "v_prediction"])
@pytest.mark.parametrize("t", [0, 17, 500, 999])
def test_the_target_implies_the_x_start_and_the_noise_that_it_was_made_of(objective: Any, t: int) -> None:
    x_start, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    timesteps = torch.full((3,), t)
    x_t, c = objective.noised(FULL, x_start, timesteps, noise), FULL.gather(timesteps, 4)
    value = objective.target(x_start, noise, c)
    tolerance = 1e-3 if t == 999 and objective is EPSILON else 1e-5  # epsilon divides by the little that is left
    torch.testing.assert_close(objective.x_start(value, x_t, c), x_start, rtol=0, atol=tolerance)
    torch.testing.assert_close(objective.noise(value, x_t, c), noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_with_min_snr_both_objectives_have_the_loss_of_x_start_with_that_weight(gamma: float | None) -> None:
    """An error of x_0 costs min(SNR, gamma) times its square, whatever the model predicts; and one bound fits both."""
    draw = torch.Generator().manual_seed(2)
    x_start, noise, wrong, variance = torch.randn(4, 6, 4, 8, 8, generator=draw).unbind(0)
    t = torch.tensor([0, 3, 120, 400, 700, 999])
    c, snr = FULL.gather(t, 4), torch.from_numpy(FULL.alphas_cumprod / (1 - FULL.alphas_cumprod))[t].float()
    x_t = V.noised(FULL, x_start, t, noise)
    guess = x_start + 0.1 * wrong
    implied = (x_t - c.signal_scale * guess) / c.noise_scale
    values = {EPSILON: implied, V: c.signal_scale * implied - c.noise_scale * guess}
    error = (0.1 * wrong).square().flatten(1).mean(1)
    for objective, value in values.items():
        output = torch.cat([value, variance], dim=1)
        losses = objective.losses(FULL, output, x_start, x_t, noise, t, min_snr_gamma=gamma)
        factor = snr if objective is EPSILON else snr + 1
        expected = error * (factor if gamma is None else snr.clamp(max=gamma))
        torch.testing.assert_close(losses["mse"], expected, rtol=1e-2, atol=1e-6)
        assert list(losses.terms) == list(objective.terms)
    bounds = [
        o.losses(FULL, torch.cat([v, variance], 1), x_start, x_t, noise, t, min_snr_gamma=gamma)["vb"]
        for o, v in values.items()
    ]
    torch.testing.assert_close(bounds[0], bounds[1], rtol=1e-2, atol=1e-3)


# --- chains


@pytest.mark.parametrize("method", METHODS)
def test_the_best_model_of_either_objective_makes_the_same_samples(method: SamplingMethod) -> None:
    spacing: Spacing = "trailing" if method in get_args(SolverName) else "ends"
    noise_model = chain(FULL, method, 20, spacing, EPSILON)
    torch.testing.assert_close(chain(FULL, method, 20, spacing), noise_model, rtol=0, atol=2e-4)


SCHEDULES = {"linear": (FULL, SHORT, False), "ends in noise alone": (without_signal(FULL), without_signal(SHORT), True)}


@pytest.mark.parametrize(("full", "short", "rescaled"), SCHEDULES.values(), ids=SCHEDULES)
def test_chains_are_those_of_diffusers(full: Schedule, short: Schedule, rescaled: bool) -> None:
    def close(ours: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    known = {"rescale_betas_zero_snr": rescaled}
    ddim = chain_of_diffusers("DDIMScheduler", full, 20, V, clip_sample=False, **known)
    close(chain(full, "ddim", 20, "trailing"), ddim)
    # Over all timesteps: with fewer, a DDPMScheduler adds noise after its last step too.
    learned = {"clip_sample": False, "variance_type": "learned_range", **known}
    close(chain(short, "ancestral", 50, "ends"), chain_of_diffusers("DDPMScheduler", short, 50, V, **learned))
    for method, name in (("dpmsolver++", "DPMSolverMultistepScheduler"), ("unipc", "UniPCMultistepScheduler")):
        solved = chain_of_diffusers(name, full, 20, V, final_sigmas_type="zero", **known)
        close(chain(full, method, 20, "trailing"), solved)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_from_noise_alone_v_leads_to_the_data(method: SamplingMethod) -> None:
    """At a signal-to-noise ratio of 0 the deterministic chains keep the number of standard deviations of the start."""
    out = chain(without_signal(FULL), method, 200, "trailing")
    assert out.isfinite().all()
    if method == "ancestral":
        assert float(out.mean()) == pytest.approx(MEAN, abs=0.2)
        assert float(out.std()) == pytest.approx(STD, abs=0.1)
    else:
        torch.testing.assert_close(out, MEAN + STD * START, rtol=0, atol=0.05)


def test_from_noise_alone_epsilon_leads_nowhere() -> None:
    assert not chain(without_signal(FULL), "ddim", 10, "trailing", EPSILON).isfinite().all()


def test_the_losses_of_v_are_finite_without_any_signal() -> None:
    schedule, t = without_signal(FULL), torch.tensor([999])
    x_start, noise = torch.randn(2, 1, 4, 4, 4).unbind(0)
    x_t = V.noised(schedule, x_start, t, noise)
    assert torch.equal(x_t, noise)
    output = torch.zeros(1, 8, 4, 4, requires_grad=True)
    losses = V.losses(schedule, output, x_start, x_t, noise, t, min_snr_gamma=None)
    losses.loss.sum().backward()
    torch.testing.assert_close(losses["mse"], x_start.square().mean().reshape(1))
    assert losses.loss.isfinite().all()
    assert output.grad is not None
    assert output.grad.isfinite().all()


# --- training

CONFIG = TrainConfig(
    model="EDT-Tiny/2",
    objective="v_prediction",
    global_batch_size=16,
    max_steps=100,
    lr=5e-3,
    min_snr_gamma=None,  # the plain error of v, which falls soonest
    ema_decay=0.9,
    log_every=20,
    checkpoint_every=40,
)


@pytest.fixture(scope="module")
def v_model() -> ModelConfig:
    return with_objective(narrow(), "v_prediction")


@pytest.fixture(scope="module")
def trained(latents: LatentDataset, v_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edt_core.training.loop.matmul_rate", lambda *_: 1e9)
        return folder, train(CONFIG, v_model, latents, LocalContext(folder, num_to_keep=9))


@pytest.fixture(scope="module")
def latents(latents_artifact: Any) -> LatentDataset:
    return LatentDataset(latents_artifact.paths("*.arrow"))


@pytest.mark.usefixtures("one_thread", "quickly")
def test_a_training_of_v_learns_and_resumes_exactly(
    trained: tuple[Path, Any], v_model: ModelConfig, latents: LatentDataset, tmp_path: Path
) -> None:
    folder, whole = trained
    losses = [row["loss"] for row in whole.history.rows]
    assert losses[-1] < 0.8 * losses[0]
    resumed = train(CONFIG, v_model, latents, cut_back(folder, tmp_path / "copy", 80))
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    assert resumed.history.rows == whole.history.rows


def test_a_checkpoint_of_v_says_so_and_is_not_resumed_as_another_objective(
    trained: tuple[Path, Any], latents: LatentDataset, tmp_path: Path
) -> None:
    folder, state = trained
    stored = json.loads((place(folder, 100) / "model_config.json").read_text())
    assert stored["objective"] == "v_prediction"
    assert objective_of_model(ModelConfig.from_dict(stored)) is V
    noise = CONFIG.model_copy(update={"objective": "epsilon"})
    with pytest.raises(UserError, match=r"objective 'v_prediction' instead of at its default"):
        train(noise, narrow(), latents, cut_back(folder, tmp_path / "copy", 80))
    with pytest.raises(UserError, match=r"train\.objective is 'epsilon', but the model has objective 'v_prediction'"):
        initial_state(noise, state.model.config)


# --- a model carries its objective


def test_at_its_default_an_objective_is_left_out_of_what_is_stored_and_digested() -> None:
    assert not {"objective", "outputs"} & narrow().to_dict().keys()
    assert "objective" not in result_fields(TrainConfig())
    config = with_objective(narrow(), "v_prediction")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert result_fields(CONFIG)["objective"] == "v_prediction"


def test_fields_of_newer_versions_are_left_out_of_a_yaml_that_is_digested() -> None:
    noise, v = (load_config(assignments=[f"train.objective={name}"]) for name in ("epsilon", "v_prediction"))
    assert "objective" not in yaml.safe_load(recorded_yaml(noise))["train"]
    assert yaml.safe_load(recorded_yaml(v))["train"]["objective"] == "v_prediction"
    assert yaml.safe_load(as_yaml(noise))["train"]["objective"] == "epsilon"
    whole = yaml.safe_load(as_yaml(noise))["sample"]
    of_guidance = {"guidance_reference", "guide"}
    later = {"time_shift", "sde_diffusion", "temperature", "amm_radius_rows", "cache", "compile", *of_guidance}
    assert yaml.safe_load(recorded_yaml(noise))["sample"] == {
        name: value for name, value in whole.items() if name not in later
    }
    assert v.model_of(next(iter(v.models)), 4).objective == "v_prediction"
    with pytest.raises(UserError, match=r"unknown objective 'score'; choose one of epsilon, v_prediction, flow"):
        load_config(assignments=["train.objective=score"])


def test_an_objective_that_does_not_exist_or_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown objective 'score'; choose one of epsilon, v_prediction, flow"):
        with_objective(narrow(), "score")
    for config, message in (
        (replace(narrow(), objective="score"), "unknown objective 'score'"),
        (replace(narrow(), outputs=1), "an output of 1 x 4 channels, but that objective needs 2 x 4"),
    ):
        with pytest.raises(UserError, match=message):
            LatentSampler(initial_model(config, 0), ChainConfig(num_sampling_steps=2), 1000)


def test_a_guide_of_another_objective_is_refused() -> None:
    model, guide = (initial_model(with_objective(narrow(), name), 0) for name in ("v_prediction", "epsilon"))
    with pytest.raises(UserError, match=r"predicts epsilon, but EDT-Tiny/2 predicts v_prediction"):
        LatentSampler(model, ChainConfig(num_sampling_steps=2, cfg_scale=2.0), 1000, guide)


def test_attention_modulation_works_on_a_model_of_v(trained: tuple[Path, Any]) -> None:
    model = trained[1].model

    def drawn(**options: Any) -> Tensor:
        return LatentSampler(model, ChainConfig(num_sampling_steps=4, **options), 1000)(LABELS, 0, range(3))

    assert not torch.equal(drawn(amm_blocks=(1,)), drawn())
    assert drawn(amm_blocks=(1,)).isfinite().all()


# --- a checkpoint from elsewhere


@pytest.mark.parametrize(
    "options", [{"prediction_type": "v_prediction"}, {"parameterization": "v"}, {"predict_v": True}], ids=str
)
def test_a_checkpoint_whose_options_say_v_is_read_as_one(options: dict[str, Any], tmp_path: Path) -> None:
    model = create_model("DiT-Tiny/2", 32, 4)
    state = {key: value + 0.1 for key, value in model.state_dict().items()}
    torch.save({"ema": state, "args": {**options, "predict_xstart": False}}, tmp_path / "a.pt")
    read = read_released_model(tmp_path / "a.pt", words=objective_words())
    assert objective_of_model(read.model.config) is V
    assert not [note for note in read.notes if "assumed" in note]
    assert load_model(str(tmp_path / "a.pt")).model.config.objective == "v_prediction"
    with pytest.raises(UserError, match=r"the model does not predict noise\. .*Other objectives are not supported"):
        read_released_model(tmp_path / "a.pt")  # of a reader that knows noise alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "epsilon", "predict_v": True}, "name 2 objectives, epsilon and v_prediction"),
        ({"prediction": "score"}, r"epsilon, or v_prediction if the options say so"),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, "the noise schedule is another one"),
    ],
)
def test_options_of_a_checkpoint_that_contradict_themselves_or_go_further_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_objective(Path("a.pt"), TrainingOptions.of({"args": options}), objective_words())


def test_a_velocity_that_its_authors_call_v_is_not_taken_for_one(tmp_path: Path) -> None:
    """A SiT has DiT's keys; its file may name its prediction v, and its rows for the variance were never trained."""
    config = create_model("DiT-Tiny/2", 32, 4).config
    state = {key: value + 0.1 for key, value in create_model("DiT-Tiny/2", 32, 4).state_dict().items()}
    for options, message in (({"prediction": "v"}, "never trained"), ({"loss": {"prediction": "v"}}, "prediction='v'")):
        untrained = dict(state)
        for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
            rows = state[key].unflatten(0, (-1, 2, config.in_channels)).clone()
            rows[:, 1] = 0
            untrained[key] = rows.flatten(0, 2)
        torch.save({"ema": untrained, "args": options}, tmp_path / "a.pt")
        with pytest.raises(UserError, match=message):
            read_released_model(tmp_path / "a.pt", words=objective_words())
    torch.save({"ema": state, "args": {"prediction": "v"}}, tmp_path / "SiT-XL-2-256.pt")
    with pytest.raises(UserError, match="the file's name contains SiT"):
        read_released_model(tmp_path / "SiT-XL-2-256.pt", words=objective_words())


def test_opened_and_stored_again_a_model_of_v_stays_one(folder: Path, tmp_path: Path) -> None:
    opened = open_model(str(folder), Folder.at(tmp_path))
    assert opened.checkpoint.counts["objective"] == "v_prediction"
    final = opened.checkpoint.directory(opened.checkpoint.counts["final"])
    assert objective_of_model(ema_model(final).config) is V


def test_an_exported_program_says_what_it_predicts(tmp_path: Path) -> None:
    save_program(tmp_path / "a.pt2", drawn_weights("DiT-Tiny/2", objective="v_prediction"), ChainConfig(), 1000)
    said = {"model.json": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=said)
    assert json.loads(said["model.json"])["objective"] == "v_prediction"


def test_a_preview_draws_what_the_sampler_draws(trained: tuple[Path, Any], tmp_path: Path) -> None:
    vae = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32)
    vae.save_pretrained(tmp_path)
    state = trained[1]
    preview = Preview(with_objective(narrow(), "v_prediction"), 1000, tmp_path, torch.device("cpu"))
    picture = np.asarray(Image.open(io.BytesIO(preview.png(state.model.state_dict()))))
    latents = LatentSampler(state.model, ChainConfig(sampler="ddim", num_sampling_steps=25), 1000)(
        np.arange(16) // 4, 0, range(16)
    )
    expected = grid(decode_to_pixels(vae.eval(), latents, None))
    assert np.abs(picture.astype(int) - expected).max() <= 1  # kernels round by the size of the batch


def test_a_model_card_says_what_the_model_predicts() -> None:
    card = ModelCard("a", with_objective(narrow(), "v_prediction"), 1, 1, {})
    assert "| predicts | v (arXiv 2202.00512), and a variance" in card.text()
    assert "| predicts | noise, and a variance" in replace(card, config=narrow()).text()


# --- as a diffusers pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of v that was as if trained on 50 timesteps: all of them can be visited."""
    path = tmp_path_factory.mktemp("v") / "p"
    whole = EDTPipeline.from_pretrained(small_pipeline(tmp_path_factory.mktemp("epsilon") / "p"))
    model = initial_model(with_objective(whole.transformer.edt.config, "v_prediction"), 0)
    model.load_state_dict(whole.transformer.edt.state_dict())
    protocol = {"num_sampling_steps": 50, "guidance_channels": None}
    save_pipeline(path, model.eval(), whole.vae, num_timesteps=50, classes="abcd", protocol=protocol)
    return path


def drawn(pipeline: EDTPipeline, **options: Any) -> Tensor:
    known = {"output_type": "latent", "generator": torch.Generator().manual_seed(3), **options}
    images: Tensor = pipeline(LABELS, **known).images
    return images


ALIKE = [("DDPMScheduler", "ancestral"), ("DDIMScheduler", "ddim"), ("DPMSolverMultistepScheduler", "dpmsolver++")]


def test_a_folder_says_v_to_diffusers_and_its_schedulers_draw_what_our_samplers_draw(folder: Path) -> None:
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    assert json.loads((folder / "transformer" / "config.json").read_text())["edt_config"]["objective"] == "v_prediction"
    pipeline = quiet(
        diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    )
    assert pipeline.objective is V
    for name, sampler in ALIKE:
        own = quiet(EDTPipeline.from_pretrained(folder))
        ours = drawn(own, sampler=sampler)
        pipeline.scheduler = getattr(diffusers, name).from_config(own.scheduler.config, timestep_spacing="trailing")
        theirs = drawn(pipeline)
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3 * float(ours.abs().max()))


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_scheduler_of_diffusers_that_is_supported_takes_v(folder: Path, name: str) -> None:
    pipeline = quiet(EDTPipeline.from_pretrained(folder))
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert drawn(pipeline, num_inference_steps=6).isfinite().all()


def test_a_scheduler_of_another_prediction_is_refused_for_a_model_of_v(folder: Path) -> None:
    pipeline = quiet(EDTPipeline.from_pretrained(folder))
    noise = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="epsilon")
    message = "its prediction_type is 'epsilon', but the model predicts 'v_prediction'"
    with pytest.raises(UserError, match=message):
        pipeline.scheduler = noise
    with pytest.raises(UserError, match=message):
        EDTPipeline.from_pretrained(folder, scheduler=noise)

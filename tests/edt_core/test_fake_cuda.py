"""What runs on a GPU, on tensors that say they are on one: no operation mixes devices, and the host seldom waits.

Values are not computed. Autocast and the backward pass need a build for CUDA; gradients are put in place of the latter.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edt_core.autoencoders import parts
from edt_core.autoencoders.autoencoder import build_autoencoder, decode_to_pixels, encode_both_sides
from edt_core.config import AutoencoderConfig, ChainConfig, TrainConfig
from edt_core.data.scale import LatentScale
from edt_core.diffusion import noise, objective_of, with_objective
from edt_core.models import DiffusionTransformer, ModelConfig, build_model
from edt_core.sampling.sampler import LatentSampler
from edt_core.training.align.alignment import alignment_of
from edt_core.training.align.settings import align_settings
from edt_core.training.draws import draw_step
from edt_core.training.ema import EMA
from edt_core.training.optim import clip_gradients, gradient_norm, make_optimizer
from edt_core.training.optimizers.muon import hidden_matrices
from edt_core.training.state import initial_state
from edt_core.training.step import StepInputs, sampled_latents, step_losses
from tests.support.autoencoders import deep_autoencoder, shifted_autoencoder
from tests.support.cases import suite_of
from tests.support.fake_cuda import CUDA, Event, fake_cuda, on_cuda, waits
from tests.support.models import TINY, shallow_config

BATCH, LABELS = 4, [1, 2, 0]
CPU = torch.device("cpu")


def model_on_cuda(config: ModelConfig) -> DiffusionTransformer:
    return on_cuda(build_model(config))


@pytest.fixture(autouse=True)
def _no_page_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs a driver, and a thread draws noise ahead, beside the mode."""
    draw = noise.sample_noise
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(noise, "sample_noise", lambda *args, pin=False, **named: draw(*args, **named))


def test_devices_that_mix_and_waiting_are_noticed() -> None:
    with fake_cuda() as mode:
        on_gpu, on_host = torch.ones(2, device="cuda"), torch.ones(2)
        assert (on_gpu.device, on_host.device.type) == (CUDA, "cpu")
        with pytest.raises(RuntimeError, match="at least two devices"):
            on_gpu + on_host
        assert not mode.syncs
        assert on_gpu.sum().item() == 1.0
        assert on_gpu.cpu().tolist() == [1.0, 1.0]
        assert mode.syncs == {"value read on the host": 1, "copy to the host": 1}
        assert (on_host * 2).numpy().tolist() == [2.0, 2.0]  # the host computes


def inputs_on_cuda(config: TrainConfig, model: ModelConfig) -> StepInputs:
    """What `Trainer._draw` makes: everything is drawn on the host and copied."""
    draws = draw_step(config, 0, model).to(CUDA)
    side = model.latent_size
    posterior = torch.ones(BATCH, 2, model.in_channels, side, side)
    batch: Any = SimpleNamespace(posterior=posterior)  # of a LatentBatch, the part that is copied
    return StepInputs(
        latents=sampled_latents(batch, draws.posterior_noise, LatentScale(0.2)),
        labels=torch.zeros(BATCH, dtype=torch.int64).to(CUDA, non_blocking=True),
        timesteps=(draws.uniforms * config.num_timesteps).long().to(CUDA, non_blocking=True),
        weights=torch.ones(BATCH).to(CUDA, non_blocking=True),
        draws=draws,
    )


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*product(TINY, ["adan"]), *product(["DiT-Tiny/2"], ["adamw", "muon"])],
)
def test_a_training_step_is_on_the_gpu_and_waits_for_nothing(name: str, optimizer: str) -> None:
    """All but the exchange, which is the one place where the host waits."""
    model_config = shallow_config(name)
    config = TrainConfig(global_batch_size=BATCH, optimizer=optimizer, masked_loss=model_config.is_masked)
    objective = objective_of(config.objective)
    with fake_cuda() as mode:
        model = model_on_cuda(model_config).train()
        trained = list(model.parameters())
        stepper, ema = make_optimizer(config, trained, hidden_matrices(model)), EMA(model, config.ema_decays)
        schedule = objective.schedule(config.num_timesteps)
        with waits(mode):
            inputs = inputs_on_cuda(config, model_config)
            losses = step_losses(model, config, schedule, inputs, model_config.num_classes)
            loss = (losses.loss * inputs.weights).sum()
        assert loss.device == CUDA
        assert all(term.shape == (config.passes, BATCH) for term in losses.terms.values())
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        for _ in range(2):  # the first step of an optimizer makes its state
            with waits(mode):
                norm = gradient_norm(trained)
                clip_gradients(trained, norm, 1.0)
                stepper.step()
                ema.update()
        assert norm.device == CUDA
        with waits(mode, "copy to the host"):
            torch.cat([*(term.flatten() for term in losses.terms.values()), norm.reshape(1)]).cpu()
    state = [v for s in stepper.state.values() for v in s.values() if torch.is_tensor(v) and v.ndim]
    assert state
    assert all(value.device == CUDA for value in [*state, *ema.averages[0].values()])


CHAINS: dict[str, dict[str, Any]] = {
    "ancestral": {},
    "ancestral, power": {"cfg_scale": 3.0, "cfg_power": 2.0, "guidance_channels": None},
    "ddim, interval, AMM": {
        "sampler": "ddim",
        "cfg_scale": 2.0,
        "guidance_channels": 3,
        "guidance_interval": (100, 700),
        "amm_blocks": (0,),
    },
}
# Waits by the end of each step. UniPC solves two equations from its third step on, and PyTorch reads whether it could.
SOLVERS: dict[str, list[int]] = {"dpmsolver++": [0, 0, 0], "unipc": [0, 0, 1]}
# The flags of which latents are finite, at the end: one copy on a GPU; here a list is read value by value.
AT_THE_END = ["value read on the host"] * len(LABELS)


# Each family and each chain. What a chain does with a model does not depend on its family.
CHAIN_OF_FAMILY = {
    "EDT-Tiny/2": "ddim, interval, AMM",
    "DiT-Tiny/2": "ancestral",
    "MDTv2-Tiny/2": "ddim, interval, AMM",
    "UViT-Tiny/2": "ancestral, power",
}


@pytest.mark.parametrize(
    ("name", "chain"),
    suite_of(list(CHAIN_OF_FAMILY.items()), product(TINY, CHAINS)),
)
def test_a_chain_is_on_the_gpu_and_waits_at_its_end(name: str, chain: str) -> None:
    config, after_steps = shallow_config(name), list[int]()
    with fake_cuda() as mode:
        sampler = LatentSampler(model_on_cuda(config), ChainConfig(num_sampling_steps=3, **CHAINS[chain]), 1000)
        with waits(mode, *AT_THE_END):
            latents = sampler(LABELS, 0, range(3), lambda _done, _total: after_steps.append(mode.syncs.total()))
    assert after_steps == [0, 0, 0]
    assert latents.device == CUDA
    assert latents.shape == (3, *sampler.latent_shape)


@pytest.mark.parametrize("name", suite_of(["DiT-Tiny/2"], TINY))
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_s_chain_is_on_the_gpu(name: str, solver: str) -> None:
    """Its coefficients are computed by numpy and on the host, and copied."""
    config, after_steps = shallow_config(name), list[int]()
    chain = ChainConfig(num_sampling_steps=3, sampler=solver, cfg_scale=2.0)
    with fake_cuda() as mode:
        sampler = LatentSampler(model_on_cuda(config), chain, 1000)
        with waits(mode, *AT_THE_END, *["errors read on the host"] * SOLVERS[solver][-1]):
            latents = sampler(LABELS, 0, range(3), lambda _done, _total: after_steps.append(mode.syncs.total()))
    assert after_steps == SOLVERS[solver]
    assert latents.device == CUDA


def test_a_chain_with_a_guide_and_another_objective() -> None:
    config = with_objective(shallow_config("DiT-Tiny/2"), "v_prediction")
    chain = ChainConfig(num_sampling_steps=3, cfg_scale=1.5)
    with fake_cuda() as mode:
        sampler = LatentSampler(model_on_cuda(config), chain, 1000, model_on_cuda(config))
        with waits(mode, *AT_THE_END):
            assert sampler(LABELS, 0, range(3)).device == CUDA


SIDE = 32


def test_images_are_encoded_in_parts_and_the_host_waits_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fetches a batch after the next one was submitted."""
    waited: list[None] = []
    monkeypatch.setattr(torch.cuda, "Event", partial(Event, waited))
    monkeypatch.setattr(parts, "_PIXELS", 4 * SIDE**2)
    vae = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), SIDE).eval()
    numbers: list[int] = []
    vae.encoder.register_forward_pre_hook(lambda _module, inputs: numbers.append(len(inputs[0])))
    batches = [(tag, np.zeros((count, SIDE, SIDE, 3), np.uint8)) for tag, count in (("a", 6), ("b", 4))]
    with fake_cuda() as mode, waits(mode, *["copy to the host"] * len(batches)):
        found = list(encode_both_sides(on_cuda(vae), batches))
    assert [(tag, rows.shape) for tag, rows in found] == [("a", (6, 2, 2, 4, 8, 8)), ("b", (4, 2, 2, 4, 8, 8))]
    assert numbers == [4, 4, 2, 2, 4, 4]  # both views of each part
    assert len(waited) == len(batches)


def test_latents_are_decoded_in_parts_and_the_host_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_PIXELS", 4 * SIDE**2)
    vae = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), SIDE).eval()
    numbers: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda _module, inputs: numbers.append(len(inputs[0])))
    with fake_cuda() as mode:
        model = on_cuda(vae)
        latents: Tensor = torch.zeros(6, 4, 8, 8, device="cuda")
        with waits(mode, "copy to the host"):
            pixels = decode_to_pixels(model, latents, None)
    assert numbers == [4, 2]
    assert pixels.shape == (6, SIDE, SIDE, 3)


@pytest.mark.parametrize(
    ("make", "shape"), [(deep_autoencoder, (32, 2, 2)), (shifted_autoencoder, (16, 8, 8))], ids=["deep", "shifted"]
)
def test_other_autoencoders_encode_and_decode(
    make: Callable[[], Any], shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", partial(Event, []))
    pixels = np.zeros((2, 64, 64, 3), np.uint8)
    vae = make()
    with fake_cuda() as mode:
        model = on_cuda(vae)
        with waits(mode, "copy to the host"):
            ((_, rows),) = encode_both_sides(model, [("a", pixels)])
        with waits(mode, "copy to the host"):
            decoded = decode_to_pixels(model, torch.zeros(2, *shape, device="cuda"), None)
    assert rows.shape == (2, 2, 2, *shape)
    assert decoded.shape == pixels.shape


@pytest.mark.parametrize("align", ["autoencoder", "self", "features"])
def test_an_aligned_step_is_on_the_gpu_and_waits_for_nothing(align: str) -> None:
    """The averaged model and the head included."""
    shape = shallow_config("EDT-Tiny/2")
    config = TrainConfig(global_batch_size=BATCH, align=align, align_features=(4, 5))
    objective, settings = objective_of(config.objective), align_settings(config, shape)
    state = initial_state(config, shape)
    alignment, schedule = alignment_of(config, settings, state, CPU), objective.schedule(config.num_timesteps)
    assert alignment is not None
    with fake_cuda() as mode:
        for network in (state.network, *alignment.networks):
            on_cuda(network)
        inputs = replace(inputs_on_cuda(config, shape), tokens=torch.ones(BATCH, 16, 5).half().to(CUDA))
        with waits(mode):
            losses = step_losses(state.network, config, schedule, inputs, shape.num_classes, alignment)
        assert (losses["align"].device, losses["align"].shape) == (CUDA, (2, BATCH))

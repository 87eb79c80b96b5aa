"""A model bound to a chain."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edt_core.config import ChainConfig
from edt_core.errors import UserError
from edt_core.models import EDT, model_config
from edt_core.sampling.sampler import LatentSampler, SamplesNotFiniteError, resolved_amm_blocks

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 4


def tiny(seed: int = 0, **changes: Any) -> EDT:
    """A tiny EDT of 32-pixel images with weights drawn at random everywhere."""
    model = EDT(replace(model_config("EDT-Tiny/2", 32, CLASSES), **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05, generator=generator)
    return model


@pytest.fixture(scope="module")
def model() -> EDT:
    return tiny()


def latents(model: EDT, indices: Any = (0, 1, 2), seed: int = 0, guide: EDT | None = None, **chain: Any) -> Tensor:
    sampler = LatentSampler(model, ChainConfig(**{"num_sampling_steps": 4, **chain}), 1000, guide)
    return sampler([index % CLASSES for index in indices], seed, indices)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmsolver++", "unipc"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_a_latent_is_a_function_of_seed_index_and_label(model: EDT, sampler: str, cfg_scale: float) -> None:
    options = {"sampler": sampler, "cfg_scale": cfg_scale}
    whole = latents(model, **options)
    assert (whole.shape, whole.dtype) == ((3, 4, 8, 8), torch.float32)
    torch.testing.assert_close(latents(model, [2, 1], **options), whole[[2, 1]], rtol=1e-4, atol=1e-3)
    assert torch.equal(latents(model, np.arange(3), **options), whole)
    assert not torch.allclose(latents(model, seed=1, **options), whole)


def test_each_option_of_the_chain_reaches_it(model: EDT) -> None:
    base: dict[str, Any] = {"sampler": "ddim", "cfg_scale": 4.0, "amm_blocks": (0, 6)}
    changes: list[dict[str, Any]] = [
        {},
        {"sampler": "unipc"},
        {"num_sampling_steps": 5},
        {"cfg_scale": 3.0},
        {"guidance_channels": None},
        {"guidance_interval": (0, 500)},
        {"amm_blocks": (0,)},
        {"amm_kernel": "cos"},
        {"amm_radius": 1.0},
        {"precision": "bf16"},
    ]
    made = [latents(model, **{**base, **change}) for change in changes]
    assert len({tuple(one.flatten().tolist()) for one in made}) == len(changes)


def test_bf16_is_for_the_model_alone(model: EDT) -> None:
    seen: list[torch.dtype] = []
    hooks = [
        model.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype)),
        model.register_forward_hook(lambda module, args, output: seen.append(output.dtype)),
    ]
    rounded = latents(model, precision="bf16")
    for hook in hooks:
        hook.remove()
    assert seen == [torch.float32, torch.bfloat16] * 4
    exact = latents(model)
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_weights_of_another_dtype_are_sampled_from_too(model: EDT) -> None:
    rounded = EDT(model.config).bfloat16()
    rounded.load_state_dict(model.state_dict())
    assert (latents(rounded) - latents(model)).abs().max() < 0.1 * latents(model).abs().max()


def test_an_interval_halves_the_work_outside(model: EDT) -> None:
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    latents(model, cfg_scale=2.0, guidance_interval=(300, 700))
    hook.remove()
    assert sizes == [3, 6, 6, 3]  # timesteps 999, 666, 333, 0


def test_a_guide_with_the_same_weights_pushes_nowhere_and_another_one_does(model: EDT) -> None:
    twin, other = tiny(), tiny(seed=1)
    plain = latents(model)
    torch.testing.assert_close(latents(model, guide=twin, cfg_scale=3.0), plain, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(latents(model, guide=other, cfg_scale=3.0), plain)


def test_two_chains_of_one_model_keep_their_own_attention(model: EDT) -> None:
    labels, indices = [0, 1], [0, 1]
    chains = [
        ChainConfig(num_sampling_steps=2, amm_blocks=(0, 6), amm_kernel="cos"),
        ChainConfig(num_sampling_steps=2, amm_blocks=(0, 6)),
        ChainConfig(num_sampling_steps=2),
    ]
    alone = [LatentSampler(tiny(), chain, 1000)(labels, 0, indices) for chain in chains]
    samplers = [LatentSampler(model.train(), chain, 1000) for chain in chains]
    model.train()
    for sampler, expected in zip(samplers, alone, strict=True):
        assert torch.equal(sampler(labels, 0, indices), expected)


def test_blocks_of_the_paper_follow_model_guidance_and_resolution() -> None:
    for scale, size, blocks in [(1.0, 256, (7, 10)), (2.0, 256, (8,)), (2.0, 512, (10,))]:
        chain = ChainConfig(amm_blocks="paper", cfg_scale=scale)
        assert resolved_amm_blocks(chain, model_config("EDT-S/2", size)) == blocks
    with pytest.raises(UserError, match=r"no placement is published for EDT-Tiny/2"):
        LatentSampler(tiny(), ChainConfig(amm_blocks="paper"), 1000)
    assert LatentSampler(tiny(), ChainConfig(amm_blocks=(1, 2)), 1000).amm_blocks == (1, 2)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ({"num_sampling_steps": 101}, "takes 2 to 100 steps"),
        ({"amm_blocks": (0, 7)}, r"amm_blocks \[7\] do not exist"),
        ({"cfg_scale": 2.0, "guidance_channels": 5}, "have 4 channels"),
        ({"cfg_scale": 2.0, "guidance_interval": (100, 200)}, "begins after the last timestep"),
    ],
)
def test_a_chain_that_does_not_fit_the_model(model: EDT, chain: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LatentSampler(model, ChainConfig(**{"num_sampling_steps": 4, **chain}), 100)


def test_without_guidance_its_channels_do_not_matter() -> None:
    narrow = tiny(in_channels=1)
    assert latents(narrow).shape == (3, 1, 8, 8)
    with pytest.raises(UserError, match=r"guidance_channels is 3, but .* have 1 channels"):
        latents(narrow, cfg_scale=2.0)


def test_a_guide_that_does_not_fit(model: EDT) -> None:
    with pytest.raises(UserError, match="a guide with cfg_scale 1 has no effect"):
        latents(model, guide=tiny())
    with pytest.raises(UserError, match="itself"):
        latents(model, guide=model, cfg_scale=2.0)
    for wrong in (tiny(num_classes=5), tiny(in_channels=3), tiny(latent_size=16)):
        with pytest.raises(UserError, match="same latents and classes"):
            latents(model, guide=wrong, cfg_scale=2.0)


@pytest.mark.parametrize("labels", [[4, 0], [-1, 0], [], [0.5, 1.0]])
def test_labels_that_the_model_does_not_have(model: EDT, labels: list[Any]) -> None:
    with pytest.raises(UserError, match=r"(the model has|in) 0\.\.3"):
        LatentSampler(model, ChainConfig(num_sampling_steps=2), 1000)(labels, 0, range(len(labels)))


def test_labels_and_indices_go_together(model: EDT) -> None:
    with pytest.raises(UserError, match="2 class labels for 3 samples"):
        LatentSampler(model, ChainConfig(num_sampling_steps=2), 1000)([0, 1], 0, range(3))


def test_a_result_that_is_no_number_is_an_error() -> None:
    broken = tiny()
    nn.init.constant_(broken.y_embedder.embedding_table.weight[1], torch.nan)
    sampler = LatentSampler(broken, ChainConfig(num_sampling_steps=2), 1000)
    with pytest.raises(SamplesNotFiniteError, match=r"2 of 6 samples \(11, 15\) are not finite.*precision fp32"):
        sampler([0, 1, 2, 3, 0, 1], 0, range(10, 16))


def test_progress_counts_the_steps(model: EDT) -> None:
    calls: list[tuple[int, int]] = []
    sampler = LatentSampler(model, ChainConfig(num_sampling_steps=3), 1000)
    sampler([0], 0, [0], progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]

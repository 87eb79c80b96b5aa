"""Gradient-free classifier guidance: away from the class that a classifier confuses each sample with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edt_core.autoencoders.autoencoder import build_autoencoder, decode
from edt_core.config import AutoencoderConfig, CacheConfig, ChainConfig
from edt_core.diffusion import SampleNoise, objective_of, sample, sampling_schedule
from edt_core.diffusion.guidance import confusion
from edt_core.errors import UserError
from edt_core.evaluation.extractors.classifier import Classifier
from edt_core.models import DiffusionTransformer, build_model, create_model
from edt_core.pipeline import EDTPipeline, save_pipeline
from edt_core.sampling.cache import FeatureCache
from edt_core.sampling.latent_classifier import LatentClassifier
from edt_core.sampling.sampler import LatentSampler
from tests.support.models import TINY, drawn_weights, shallow_config
from tests.support.pipelines import quiet

LABELS = [3, 1, 0]
Y = torch.tensor(LABELS)
DIFFUSION = tuple(name for name in TINY if not name.startswith("MaskGIT"))


def judged(latents: Tensor) -> Tensor:
    """Probabilities of four classes that depend on the latents, [N, 4]."""
    return (3 * latents.mean(dim=(2, 3))).softmax(1)


def sampled(model: DiffusionTransformer, guide: DiffusionTransformer | None = None, **chain: Any) -> Tensor:
    fields = {"num_sampling_steps": 4, "cfg_scale": 3.0, "guidance_channels": None, "guidance_reference": "confused"}
    return LatentSampler(model, ChainConfig(**{**fields, **chain}), 1000, guide, classify=judged)(LABELS, 7, range(3))


def start() -> Tensor:
    return SampleNoise(7, range(3), (4, 8, 8), torch.device("cpu")).initial()


def test_the_reference_is_the_most_probable_other_class() -> None:
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.6, 0.1], [1.0, 0.0, 0.0, 0.0]])
    reference, doubt = confusion(probabilities, Y)
    assert reference.tolist() == [2, 2, 1]
    torch.testing.assert_close(doubt, torch.tensor([0.6, 0.8, 0.0]))


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "flow"])
def test_what_a_prediction_implies_is_the_data(name: str) -> None:
    """Noised to any time, a perfect prediction gives the data back."""
    objective, generator = objective_of(name), torch.Generator().manual_seed(0)
    schedule = objective.schedule(1000)
    x_start, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(2))
    t = torch.tensor([0.1, 0.5, 0.9]) if objective.continuous else torch.tensor([10, 500, 900])
    x_t = objective.noised(schedule, x_start, t, noise)
    if name == "flow":
        output = x_start - noise
    else:
        assert schedule is not None
        c = schedule.gather(t, 4)
        value = noise if name == "epsilon" else c.signal_scale * noise - c.noise_scale * x_start
        output = torch.cat([value, torch.zeros_like(value)], dim=1)
    torch.testing.assert_close(objective.denoised(schedule, output, x_t, t), x_start, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", DIFFUSION)
def test_a_chain_of_flow_by_hand(name: str) -> None:
    model = drawn_weights(name, objective="flow")
    x = start()
    with torch.no_grad():
        for step in range(4):
            t = torch.full((3,), step / 4)
            own = model(x, t, Y)
            p = judged(x + (1 - step / 4) * own)
            ranked = p.argsort(dim=1, descending=True).tolist()
            others = torch.tensor([next(k for k in row if k != y) for y, row in zip(LABELS, ranked, strict=True)])
            doubt = (1 - p[range(3), LABELS]).view(3, 1, 1, 1)
            x = x + (own + 2 * doubt * (own - model(x, t, others))) / 4
    torch.testing.assert_close(sampled(model, sampler="euler"), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction"])
def test_a_chain_of_ddim_by_hand_with_a_guide(name: str) -> None:
    """Away from the guide's prediction: for the class itself where the classifier takes the sample for it."""
    model, guide = drawn_weights(objective=name), drawn_weights("DiT-Tiny/2", 1, name)
    objective, used = objective_of(name), []

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        own = model(x, t, Y)
        schedule = objective.schedule(1000)
        assert schedule is not None
        ab = schedule.gather(t, 4).signal_scale ** 2
        value = own[:, :4]
        x0 = (x - (1 - ab).sqrt() * value) / ab.sqrt() if name == "epsilon" else ab.sqrt() * x - (1 - ab).sqrt() * value
        p = judged(x0)
        others = torch.where(p.argmax(1) == Y, Y, confusion(p, Y)[0])
        used.append(others.tolist())
        other = guide(x, t, others)[:, :4]
        return torch.cat([other + 3 * (value - other), own[:, 4:]], dim=1)

    schedule = objective.schedule(1000)
    assert schedule is not None
    latents = sample(by_hand, start(), sampling_schedule(schedule, 4, "ddim"), "ddim", objective=objective)
    torch.testing.assert_close(sampled(model, guide, sampler="ddim"), latents, rtol=1e-3, atol=1e-3)
    assert any(other != y for row in used for other, y in zip(row, LABELS, strict=True))


def test_a_sample_that_is_surely_of_its_class_is_not_guided() -> None:
    model = drawn_weights()
    chain = ChainConfig(num_sampling_steps=4, cfg_scale=3.0, guidance_reference="confused", sampler="ddim")
    sure = torch.nn.functional.one_hot(Y, 4).float()
    latents = LatentSampler(model, chain, 1000, classify=lambda _: sure)(LABELS, 7, range(3))
    plain = LatentSampler(model, chain.model_copy(update={"cfg_scale": 1.0}), 1000)(LABELS, 7, range(3))
    torch.testing.assert_close(latents, plain, rtol=1e-4, atol=1e-4)


def test_intervals_and_amm_and_the_default() -> None:
    model = drawn_weights()
    plain = sampled(model, cfg_scale=1.0)
    assert torch.equal(sampled(model, guidance_interval=(1000.0 - 1e-6, 1000.0), cfg_scale=3.0), plain)
    assert not torch.equal(sampled(model, guidance_interval=(0.0, 500.0)), plain)
    assert not torch.equal(sampled(model, amm_blocks=(1,)), sampled(model))
    default = ChainConfig(num_sampling_steps=4, cfg_scale=3.0)
    ours = LatentSampler(model, default, 1000, classify=judged)(LABELS, 7, range(3))
    assert torch.equal(ours, LatentSampler(model, default, 1000)(LABELS, 7, range(3)))


@pytest.mark.parametrize("kind", ["taylor", "newton", "delta"])
def test_a_cache_keeps_the_features_of_both_classes_apart(kind: Any) -> None:
    """Of the confused class they are flushed when it changes: else a series would go through two classes."""
    model = drawn_weights()
    whole = sampled(model, cache=CacheConfig(kind=kind, interval=1))
    assert torch.equal(whole, sampled(model))
    cached = sampled(model, cache=CacheConfig(kind=kind, interval=2, order=0, warmup=1), num_sampling_steps=8)
    assert torch.isfinite(cached).all()
    cache = FeatureCache(CacheConfig(kind=kind, interval=3, warmup=1))
    labels = [[1, 2], [1, 2], [0, 2], [0, 2]]
    for number, row in enumerate(labels):
        cache.begin(2)
        cache.begin(2, "reference", torch.tensor(row))
        assert cache.full == [2, 2, 3, 4][number]  # of 2, 4, 6 and 8 calls


def test_what_has_no_class_to_be_confused_with_is_refused() -> None:
    chain = ChainConfig(num_sampling_steps=4, cfg_scale=3.0, guidance_reference="confused")
    with pytest.raises(UserError, match="needs a classifier, and there is none"):
        LatentSampler(drawn_weights(), chain, 1000)
    with pytest.raises(UserError, match="has one class, which nothing can be confused with"):
        LatentSampler(create_model("EDT-Tiny/2", 32, 1), chain, 1000, classify=judged)
    codes = build_model(shallow_config("MaskGIT-Tiny"))
    tokens = chain.model_copy(update={"sampler": "halton", "guidance_channels": None})
    with pytest.raises(UserError, match=r"predicts codes; set guidance_reference=null"):
        LatentSampler(codes, tokens, 1000, classify=judged)


def classifier() -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(4, base_channels=4, feature_dim=8).eval()


def test_a_folder_carries_its_classifier(tmp_path: Path) -> None:
    vae = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32).eval()
    model, judge = drawn_weights(), classifier()
    protocol = {"num_sampling_steps": 3, "cfg_scale": 2.0, "guidance_reference": "confused"}
    facts: dict[str, Any] = {"num_timesteps": 1000, "classes": "abcd", "protocol": protocol}
    save_pipeline(tmp_path / "p", model, vae, **facts, classifier=judge)
    pipeline = quiet(EDTPipeline.from_pretrained(tmp_path / "p"))
    classify = LatentClassifier(vae, judge, model.config)
    expected = LatentSampler(model, ChainConfig(**protocol), 1000, classify=classify)(LABELS, 7, range(3))
    assert torch.equal(pipeline(LABELS, seed=7, output_type="latent").images, expected)
    index = json.loads((tmp_path / "p" / "model_index.json").read_text())
    assert index["classifier"] == ["edt_core.pipeline", "EDTClassifier"]
    assert index["protocol"]["guidance_reference"] == "confused"
    pipeline.save_pretrained(tmp_path / "again")
    again = quiet(EDTPipeline.from_pretrained(tmp_path / "again"))
    assert torch.equal(again(LABELS, seed=7, output_type="latent").images, expected)
    low = quiet(EDTPipeline.from_pretrained(tmp_path / "p", torch_dtype=torch.bfloat16))
    assert torch.isfinite(low(LABELS, seed=7, output_type="latent").images).all()
    save_pipeline(tmp_path / "without", model, vae, **facts)
    with pytest.raises(UserError, match="needs a classifier"):
        quiet(EDTPipeline.from_pretrained(tmp_path / "without"))(LABELS)


def test_the_probabilities_are_those_of_the_decoded_images() -> None:
    vae = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32).eval()
    model, judge = drawn_weights(), classifier()
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = judge(decode(vae, latents, model.config).clamp(-1, 1))[1].softmax(1)
    torch.testing.assert_close(LatentClassifier(vae, judge, model.config)(latents), expected)
    with pytest.raises(UserError, match="the classifier has 4 classes and EDT-Tiny/2 10"):
        LatentClassifier(vae, judge, create_model("EDT-Tiny/2", 32, 10).config)

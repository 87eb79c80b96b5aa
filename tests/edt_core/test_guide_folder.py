"""A weaker model as guide: the formula of autoguidance, and a diffusers folder that has the guide's weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edt_core.autoencoders.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig, ChainConfig
from edt_core.diffusion import SampleNoise
from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer
from edt_core.pipeline import EDTPipeline, save_pipeline
from edt_core.sampling.sampler import LatentSampler
from tests.support.models import TINY, drawn_weights
from tests.support.pipelines import quiet

LABELS = [3, 1, 0]
DIFFUSION = tuple(name for name in TINY if not name.startswith("MaskGIT"))


@pytest.mark.parametrize("name", DIFFUSION)
def test_the_guided_prediction_is_that_of_the_paper(name: str) -> None:
    """D = w D1 - (w - 1) D0 (arXiv 2406.02507, eq. 2 with w = 1 + its extrapolation), here of velocities by Euler."""
    model, guide = drawn_weights(name, 0, "flow"), drawn_weights("DiT-Tiny/2", 1, "flow")
    chain = ChainConfig(sampler="euler", num_sampling_steps=3, cfg_scale=2.5, guidance_channels=None)
    sampler = LatentSampler(model, chain, 1000, guide)
    latents = sampler(LABELS, 7, range(3))
    x, y = SampleNoise(7, range(3), sampler.latent_shape, torch.device("cpu")).initial(), torch.tensor(LABELS)
    with torch.no_grad():
        for step in range(3):
            t = torch.full((3,), step / 3)
            x = x + (2.5 * model(x, t, y) - 1.5 * guide(x, t, y)) / 3
    torch.testing.assert_close(latents, x, rtol=1e-4, atol=1e-4)


def saved(folder: Path, guide: DiffusionTransformer | None) -> Path:
    """A folder of a model of four classes with guidance by 2."""
    vae = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32)
    protocol = {"num_sampling_steps": 3, "cfg_scale": 2.0}
    model = drawn_weights("EDT-Tiny/2", 0)
    save_pipeline(folder, model, vae, num_timesteps=1000, classes="abcd", protocol=protocol, guide=guide)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("guided") / "p", drawn_weights("DiT-Tiny/2", 1))


def of_pipeline(pipeline: EDTPipeline, **options: Any) -> Tensor:
    latents: Tensor = quiet(pipeline)(LABELS, seed=7, output_type="latent", **options).images
    return latents


def by_sampler(guide: DiffusionTransformer | None, **fields: Any) -> Tensor:
    chain = ChainConfig(**{"num_sampling_steps": 3, "cfg_scale": 2.0, **fields})
    return LatentSampler(drawn_weights("EDT-Tiny/2", 0), chain, 1000, guide)(LABELS, 7, range(3))


def test_the_folder_draws_away_from_its_guide(folder: Path, tmp_path: Path) -> None:
    pipeline, guide = EDTPipeline.from_pretrained(folder), drawn_weights("DiT-Tiny/2", 1)
    assert torch.equal(of_pipeline(pipeline), by_sampler(guide))
    assert not torch.allclose(by_sampler(guide), by_sampler(None))
    assert torch.equal(of_pipeline(pipeline, cfg_scale=1.0), by_sampler(None, cfg_scale=1.0))
    interval = {"guidance_interval": (300.0, 700.0)}
    assert torch.equal(of_pipeline(pipeline, **interval), by_sampler(guide, **interval))
    quiet(pipeline).save_pretrained(tmp_path / "again")
    assert torch.equal(of_pipeline(EDTPipeline.from_pretrained(tmp_path / "again")), by_sampler(guide))
    assert torch.equal(of_pipeline(EDTPipeline.from_pipe(pipeline)), by_sampler(guide))


def test_a_folder_without_a_guide_is_as_before(folder: Path, tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain", None)
    index = json.loads((plain / "model_index.json").read_text())
    assert "guide" not in index
    assert not (plain / "guide").exists()
    pipeline = EDTPipeline.from_pretrained(plain)
    assert pipeline.guide is None
    assert torch.equal(of_pipeline(pipeline), by_sampler(None))
    assert json.loads((folder / "model_index.json").read_text())["guide"] == ["edt_core.pipeline", "EDTTransformer"]


def test_jobs_read_the_guide_of_a_folder(folder: Path) -> None:
    from jobs.models.open import load_model

    loaded = load_model(str(folder))
    assert loaded.guide is not None
    assert loaded.guide_of(ChainConfig()) is None
    chain = ChainConfig(**loaded.sampling)
    sampler = LatentSampler(loaded.model, chain, loaded.num_timesteps, loaded.guide_of(chain))
    assert torch.equal(sampler(LABELS, 7, range(3)), by_sampler(drawn_weights("DiT-Tiny/2", 1)))


def test_a_guide_of_other_latents_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="predicts flow, but EDT-Tiny/2 predicts epsilon"):
        saved(tmp_path / "p", drawn_weights("DiT-Tiny/2", 1, "flow"))

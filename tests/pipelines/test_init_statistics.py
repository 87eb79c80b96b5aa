"""Normalised latents (train.latent_norm) and the model that a training starts from: what is refused before it runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from edt_core.autoencoders.autoencoder import build_autoencoder
from edt_core.config import AutoencoderConfig, TrainConfig
from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer, build_model
from jobs.models.initial import INIT_FROM_TAG, INIT_TAG, initial_source
from jobs.stages.train import config_of
from pipelines.config.schema import PipelineConfig, load_config
from pipelines.pipeline.inputs import Published
from tests.support.models import made_model, opened, released
from tests.support.registry import REAL, Registry, registered

MEAN, STD = (0.5, 0.0, -1.0, 2.0), (1.0, 2.0, 4.0, 0.5)
LATENTS = {
    "latent_shape": [4, 8, 8],
    "image_size": 32,
    "classes": 4,
    "scaling_factor": 1.0,
    "channel_mean": [1.0] * 4,
    "channel_std": [3.0] * 4,
}


@pytest.fixture(autouse=True)
def _no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def with_statistics() -> DiffusionTransformer:
    model = made_model()
    normalised = build_model(replace(model.config, latents_mean=MEAN, latents_std=STD))
    normalised.load_state_dict(model.state_dict())
    return normalised.eval()


def in_registry(folder: Path, model: DiffusionTransformer) -> Registry:
    """A registry whose champion is a model."""
    registry = Registry(folder / "store")
    registered(registry, folder, opened(folder, model), torch_export=False)
    return registry


def asked(*assignments: str) -> PipelineConfig:
    return load_config("quickstart", ["train.objective=epsilon", "train.latent_norm=true", *assignments])


def autoencoder(folder: Path, **scale: object) -> str:
    vae = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32)
    vae.register_to_config(**scale)
    vae.save_pretrained(folder / "vae")
    return f"autoencoder.pretrained={folder / 'vae'}"


def test_a_model_without_statistics_is_refused_before_a_run(tmp_path: Path) -> None:
    uri = in_registry(tmp_path, made_model()).catalog.tracking_uri
    champion = f"train.init_from={REAL}@champion"
    message = rf"train\.init_from is models:/{REAL}/1, which was trained on latents that are not normalised by channel"
    own = autoencoder(tmp_path)
    for chosen in ("autoencoder.pretrained=null", own, f"autoencoder.pretrained=models:/{REAL}@champion"):
        with pytest.raises(UserError, match=message):
            Published.of(asked(champion, chosen), uri)
    assert Published.of(asked(champion, own, "train.latent_norm=false"), uri).initial
    # The statistics of an autoencoder make `latent_norm` change nothing; of one that is not there nothing is known yet.
    stated = autoencoder(tmp_path, latents_mean=list(MEAN), latents_std=list(STD))
    for chosen in (stated, f"autoencoder.pretrained={tmp_path / 'missing'}"):
        assert Published.of(asked(champion, chosen), uri).initial


def test_a_released_file_is_refused_too(tmp_path: Path) -> None:
    file = released(tmp_path, "EDT-Tiny/2")
    with pytest.raises(UserError, match=rf"train\.init_from is {file}, which was trained on latents that are not"):
        Published.of(asked(f"train.init_from={file}"), None)


def test_the_model_before_the_champion_has_the_champion_s_statistics(tmp_path: Path) -> None:
    """Its training may run again, after its artifact was removed, and then starts from that model."""
    registry = in_registry(tmp_path, with_statistics())
    for key, value in {INIT_TAG: "a" * 64, INIT_FROM_TAG: "models:/gone/1"}.items():
        registry.catalog.client.set_model_version_tag(REAL, "1", key, value)
    initial = initial_source(TrainConfig(init_from=f"{REAL}@champion"), registry.catalog.tracking_uri)
    assert initial is not None
    assert initial.before is not None
    for latent_norm in (True, False):
        config = TrainConfig(model="EDT-Tiny/2", latent_norm=latent_norm)
        model = config_of(config, LATENTS, initial.before)
        assert (model.latents_mean, model.latents_std) == (MEAN, STD)

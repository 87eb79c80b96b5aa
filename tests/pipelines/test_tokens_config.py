"""A pipeline of masked tokens: what its model sets, and what is refused before anything runs."""

from typing import Any

import pytest
import yaml

from edt_core.diffusion import train_defaults
from edt_core.errors import UserError
from jobs.commands.options import validated
from pipelines.config.schema import PipelineConfig, load_config, recorded_yaml
from pipelines.setup.init import check_model, models_text

TOKENS: dict[str, Any] = {
    "name": "tokens",
    "source": {"kind": "digits"},
    "preprocess": {"image_size": 32},
    "autoencoder": {"kind": "fsq", "downsample_factor": 4},
    "train": {"model": "MaskGIT-Tiny"},
    "models": {"tokens": {}},
}


def config(**sections: Any) -> PipelineConfig:
    given = {name: {**TOKENS.get(name, {}), **fields} for name, fields in sections.items()}
    made: PipelineConfig = validated(PipelineConfig, {**TOKENS, **given})
    return made


def test_the_model_sets_objective_recipe_and_sampler() -> None:
    made = config()
    train = made.train_of("tokens")
    assert (train.objective, train.timestep_sampler, train.min_snr_gamma) == ("masked_tokens", "uniform", None)
    assert not train.masked_loss
    assert (made.sample.sampler, made.sample.num_sampling_steps, made.sample.guidance_channels) == ("halton", 32, None)
    assert made.model_of("tokens", 10).out_channels == 1000
    again = PipelineConfig.model_validate(yaml.safe_load(recorded_yaml(made)))
    assert recorded_yaml(again) == recorded_yaml(made)
    chosen = config(sample={"num_sampling_steps": 8, "cfg_scale": 2.0, "temperature": 0.9}).sample
    assert (chosen.sampler, chosen.num_sampling_steps, chosen.temperature) == ("halton", 8, 0.9)


def test_a_model_of_tokens_beside_the_objective_of_others() -> None:
    tokens = {"model": "MaskGIT-Tiny"}
    flow = {"model": "DiT-Tiny/2", "objective": "flow", "masked_loss": False}
    sample = {"sampler": "halton", "guidance_channels": None, "num_sampling_steps": 16}
    made = config(train=flow, models={"tokens": tokens}, sample=sample)
    assert (made.train.objective, made.train_of("tokens").objective) == ("flow", "masked_tokens")
    with pytest.raises(UserError, match="sampled by one of"):  # one sampler for both is not possible
        config(train=flow, models={"dit": {}, "tokens": tokens}, sample=sample)
    plain = load_config("ablation")
    assert plain.train.objective == "epsilon"
    assert plain.sample.sampler == "ancestral"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"autoencoder": {"kind": "kl"}}, "predicts codes, but these latents are of an autoencoder without codes"),
        ({"autoencoder": {"kind": "fsq", "latent_channels": 8}}, "set latent_channels=4"),
        ({"train": {"objective": "flow"}}, "its objective is masked_tokens, not flow"),
        ({"train": {"model": "DiT-Tiny/2", "objective": "masked_tokens"}}, "predicts numbers and not codes"),
        ({"train": {"timestep_sampler": "logit-normal"}}, "set timestep_sampler to uniform"),
        ({"train": {"min_snr_gamma": 5.0}}, "set min_snr_gamma to null"),
        ({"train": {"masked_loss": True}}, "has no masked pass"),
        ({"train": {"time_shift": 2.0}}, "set time_shift to 1"),
        ({"train": {"align": "autoencoder"}}, "set align to null"),
        ({"train": {"latent_norm": True}}, "set latent_norm to false"),
        ({"sample": {"sampler": "ddim"}}, "sampled by one of halton"),
        ({"sample": {"num_sampling_steps": 65}}, "use at most 64"),
        ({"sample": {"cfg_scale": 2.0, "guidance_channels": 3}}, "set guidance_channels to null"),
        ({"sample": {"amm_blocks": [1]}}, "set amm_blocks"),
        ({"sample": {"amm_blocks": "paper"}}, "no placement is published for MaskGIT-Tiny"),
        ({"sample": {"amm_radius": 2.0}}, "set both to null"),
        ({"sample": {"cfg_scale": 2.0, "guidance_interval": [0.2, 2.0]}}, "ends above 1"),
    ],
)
def test_what_has_no_meaning_is_refused_with_the_field(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**sections)


def test_a_temperature_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="set temperature to 1"):
        load_config("ablation", ["sample.temperature=0.5"])


def test_the_defaults_of_a_recipe_follow_from_its_model() -> None:
    assert train_defaults({"model": "MaskGIT-S"})["objective"] == "masked_tokens"
    assert train_defaults({"model": "DiT-S/2"}) == {}
    assert train_defaults({"model": "no-such-model", "objective": "flow"})["timestep_sampler"] == "uniform"


def test_the_wizard_writes_configurations_of_diffusion_models() -> None:
    assert "MaskGIT" not in models_text()
    with pytest.raises(UserError, match="trained on codes, but this wizard"):
        check_model("maskgit-s")

"""Configurations: the shipped ones are whole, and mistakes are told with numbers and remedy."""

from pathlib import Path

import pytest
import yaml

from edt_core.errors import UserError
from pipelines.config.schema import as_yaml, config_names, load_config


@pytest.mark.parametrize("name", config_names())
def test_every_shipped_configuration_loads_and_round_trips(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.name == name
    path = tmp_path / "again.yaml"
    path.write_text(as_yaml(config))
    assert load_config(str(path)) == config


def test_the_imagenet_configurations_have_the_paper_s_recipe() -> None:
    rates = {"s": 1e-3, "b": 1e-3, "xl": 5e-4}
    for size, rate in rates.items():
        config = load_config(f"imagenet256-edt-{size}")
        train = config.train_of(f"edt-{size}-2-256")
        assert train.model == f"EDT-{size.upper()}/2"
        assert (train.lr, train.lr_final, train.max_steps) == (rate, 5e-5, 400_000)
        assert (train.global_batch_size, train.ema_decay, train.class_dropout_prob) == (256, 0.9999, 0.1)
        assert config.autoencoder.pretrained == "stabilityai/sd-vae-ft-ema"


@pytest.mark.parametrize("size", ["s", "b", "l", "xl"])
def test_the_other_models_have_the_recipes_of_their_authors(size: str) -> None:
    """DiT: section 4 of arXiv 2212.09748. MDTv2: the commands and defaults of its authors' training code."""
    config = load_config(f"imagenet256-dit-{size}")
    train = config.train_of(f"dit-{size}-2-256")
    assert (train.model, train.optimizer, train.lr) == (f"DiT-{size.upper()}/2", "adamw", 1e-4)
    assert (train.lr_schedule, train.timestep_sampler, train.min_snr_gamma) == ("constant", "uniform", None)
    assert (train.masked_loss, train.global_batch_size, train.ema_decay) == (False, 256, 0.9999)
    config = load_config(f"imagenet256-mdtv2-{size}")
    train = config.train_of(f"mdtv2-{size}-2-256")
    assert (train.model, train.optimizer) == (f"MDTv2-{size.upper()}/2", "adan")
    assert (train.lr_schedule, train.timestep_sampler, train.min_snr_gamma) == ("constant", "uniform", 5.0)
    assert (train.masked_loss, train.max_grad_norm) == (True, 1.0)
    assert (config.sample.cfg_power, config.sample.amm_blocks, config.sample.num_samples) == (4.0, "model", 50_000)


def test_a_configuration_may_stand_on_another(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: quickstart\nname: mine\ntrain: {lr: 0.5}\nmodels: {other: {seed: 3}}\n")
    mine, base = load_config(str(path)), load_config("quickstart")
    assert (mine.name, list(mine.models)) == ("mine", ["other"])
    assert mine.train == base.train.model_copy(update={"lr": 0.5})
    assert (mine.source, mine.sample) == (base.source, base.sample)
    path.write_text(f"base: {path}\nname: mine\n")
    with pytest.raises(UserError, match=r"configurations are based on each other: .*mine\.yaml -> .*mine\.yaml"):
        load_config(str(path))
    path.write_text("base: quickstar\n")
    with pytest.raises(UserError, match="no configuration 'quickstar'"):
        load_config(str(path))


def test_a_masked_loss_is_refused_of_a_model_without_masks() -> None:
    with pytest.raises(UserError, match=r"DiT-S/2 has no masked pass.*train\.masked_loss=false"):
        load_config("imagenet256-dit-s", ["train.masked_loss=true"])


def test_a_model_s_fields_stand_over_the_shared_ones() -> None:
    config = load_config("quickstart", ["models.other.lr=0.5", "models.other.seed=3"])
    assert config.train_of("other").lr == 0.5
    assert config.train_of("edt-tiny-digits-32").lr == config.train.lr


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["train.max_step=5"],
            r"unknown configuration key 'train\.max_step'; did you mean train\.max_steps\?$",
        ),
        (["trane.max_steps=5"], r"unknown configuration key 'trane'; did you mean train\?$"),
        (["max_steps=5"], r"unknown configuration key 'max_steps'; did you mean train\.max_steps\?$"),
        (["qqqqqqq=5"], r"unknown configuration key 'qqqqqqq'; known keys here: along, autoencoder, .*, wandb$"),
        (["preprocess.image_size=36"], r"latents of 9x9 .*Use a multiple of 8, .* multiple of 32"),
        (
            ["preprocess.image_size=30"],
            r"30 pixels is not divisible by the autoencoder's factor 4.*multiple of 32",
        ),
        (["train.global_batch_size=1"], r"global_batch_size is 1, less than the 2 workers"),
        (
            ["train.num_workers=[3, 2]"],
            r"num_workers is \(3, 2\); it must be .* or \[minimum, maximum\]",
        ),
        (["train.seed=-1"], r"'train\.seed'.*greater than or equal to 0"),
        (["train.max_hours=.inf"], r"'train\.max_hours'.*finite number"),
        (["train.num_workers=0"], r"num_workers is 0; it must be"),
        (["train.ema_decay=[0.9, 0.9]"], r"ema_decay is \(0\.9, 0\.9\); it must be a number.*several different ones"),
        (["train.ema_decay=1"], r"ema_decay is 1\.0; it must be a number from 0 to below 1"),
        (["train.precision=fp8"], r"'train\.precision'.*'fp32', 'tf32' or 'bf16'"),
        (["train.model=EDT-M/2"], r"Unknown model 'EDT-M/2'; did you mean .*EDT-XL/2"),
        (["autoencoder.downsample_factor=3"], r"downsample_factor is 3; it must be a power of two"),
        (["train.lr=-1"], r"'train\.lr'.*greater than 0.*-1"),
        (["models.a.max_step=5"], r"unknown configuration key 'max_step'"),
        (["source.kind=image_folder"], r"source\.path is missing"),
        (["train.reader=webdataset"], r"write_webdataset is false"),
        (["train=5"], r"'train'.*5"),
        (["train.objective=epsilon", "sample.num_sampling_steps=2000"], r"2000 is more than the 1000 timesteps"),
        (["sample.guidance_channels=9"], r"guidance_channels 9 is more than the 4 latent channels"),
        (["sample.amm_blocks=paper"], r"no placement is published for EDT-Tiny/2 at 32 px with cfg_scale 1\.75"),
        (["sample.amm_blocks=[99]"], r"amm_blocks \[99\] do not exist.*0\.\.6"),
        (["evaluate.metrics=[kid]"], r"'fd_classifier' is not measured; measured are: kid_classifier"),
        (["models.a/b.seed=1"], r"'a/b' is no valid registry name"),
        (["train.lr=[1"], r"--set train\.lr: '\[1' is not a YAML value"),
    ],
)
def test_mistakes_are_told_before_anything_runs(assignments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("quickstart", assignments)


def test_an_unknown_configuration_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no configuration 'quickstrat'.*quickstart"):
        load_config("quickstrat")


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    for text, message in (("a: [", "is not YAML"), ("- 1", "expected a mapping of fields")):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(str(path))
    with pytest.raises(UserError, match="No such file"):
        load_config(str(tmp_path / "missing.yaml"))


def test_the_quickstart_states_only_what_differs_from_the_defaults() -> None:
    from pipelines.config import schema as module

    stated = yaml.safe_load((Path(module.__file__).parents[1] / "configs" / "quickstart.yaml").read_text())
    assert stated["source"] == {"kind": "digits"}
    assert set(stated) <= set(module.PipelineConfig.model_fields)

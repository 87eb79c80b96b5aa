"""What the options of a released checkpoint say of its weights."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from edt_core.errors import UserError
from edt_core.models import model_config
from edt_core.models.training_options import TrainingOptions, check_against_config, check_objective, option_notes

PATH = Path("released.pt")
DIT = model_config("DiT-S/2")
MDT = model_config("MDTv2-S/2")
AUTHORS: dict[str, tuple[str, dict[str, Any]]] = {  # as their training scripts save or take them
    "DiT": (
        "DiT-S/2",
        {
            "data_path": "/d",
            "results_dir": "results",
            "model": "DiT-S/2",
            "image_size": 256,
            "num_classes": 1000,
            "epochs": 1400,
            "global_batch_size": 256,
            "global_seed": 0,
            "vae": "ema",
            "num_workers": 4,
            "log_every": 100,
            "ckpt_every": 50_000,
        },
    ),
    "EDT": (
        "EDT-S/2",
        {
            "feature_path": "f",
            "checkpoint_path": "",
            "schedule_sampler": "loss-second-moment",
            "model": "EDT-S/2",
            "image_size": 256,
            "num_classes": 1000,
            "mini_batch_size": -1,
            "vae": "ema",
            "init_lr": 1e-3,
            "resume_step": 0,
        },
    ),
    "MDTv2": (
        "MDTv2-S/2",
        {
            "model": "MDTv2_S_2",
            "image_size": 256,
            "mask_ratio": 0.3,
            "decode_layer": 6,
            "class_cond": True,
            "use_fp16": False,
            "learn_sigma": True,
            "diffusion_steps": 1000,
            "noise_schedule": "linear",
            "timestep_respacing": "",
            "use_kl": False,
            "predict_xstart": False,
            "sigma_small": False,
            "rescale_learned_sigmas": False,
            "ema_rate": "0.9999",
        },
    ),
}


def options(**values: Any) -> TrainingOptions:
    return TrainingOptions.of({"args": argparse.Namespace(**values)})


@pytest.mark.parametrize("family", AUTHORS)
def test_the_options_of_the_authors_are_all_known(family: str) -> None:
    name, values = AUTHORS[family]
    check_objective(PATH, options(**values))
    check_against_config(PATH, options(**values), model_config(name))
    assert option_notes(options(**values), model_config(name)) == []


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"prediction": "velocity"}, "does not predict noise"),
        ({"prediction-type": "v_prediction"}, "does not predict noise"),
        ({"objective": "rectified_flow"}, "does not predict noise"),
        ({"parameterization": "x0"}, "does not predict noise"),
        ({"predict_xstart": True}, "does not predict noise"),
        ({"predict_xstart": "True"}, "does not predict noise"),
        ({"path_type": "VP", "prediction": "noise"}, "continuous path"),
        ({"train_eps": 0.001}, "continuous path"),
        ({"noise_schedule": "cosine"}, "noise schedule is another"),
        ({"noise_schedule": "squaredcos_cap_v2"}, "noise schedule is another"),
        ({"beta_end": 0.012}, "noise schedule is another"),
        ({"linear_start": 0.0015}, "noise schedule is another"),
        ({"rescale_betas_zero_snr": True}, "noise schedule is another"),
        ({"diffusion_steps": 4000}, "another number of timesteps"),
        ({"timestep_respacing": "ddim250"}, "part of the timesteps"),
        ({"learn_sigma": False}, "predicts no variance"),
        ({"class_cond": False}, "no class labels"),
        ({"class_dropout_prob": 0.0}, "no null class"),
        ({"use_rope": True}, "rotates"),
        ({"model": "SiT-B/2"}, "it is a SiT"),
    ],
)
def test_options_that_change_what_the_weights_mean_are_refused(changed: dict[str, Any], reason: str) -> None:
    name = next(iter(changed)).replace("-", "_")
    with pytest.raises(UserError, match=rf"released\.pt: its training options have {name}=.*{reason}.*not supported"):
        check_objective(PATH, options(**changed))


@pytest.mark.parametrize(
    "values",
    [
        {"prediction": "noise"},
        {"prediction_type": "Epsilon"},
        {"predict_xstart": "false"},
        {"path_type": None, "noise_schedule": None},
        {"timestep_respacing": "1000", "diffusion_steps": "1000"},
        {"class_dropout_prob": 0.1},
        {"eval": {"timesteps": 50}, "sampling": {"timestep_respacing": "250"}},
    ],
)
def test_options_with_the_supported_values_pass(values: dict[str, Any]) -> None:
    check_objective(PATH, options(**values))


def test_nested_options_and_options_as_text_are_looked_at() -> None:
    for content in (
        {"hyper_parameters": {"diffusion": {"prediction": "velocity"}}},
        {"config": argparse.Namespace(diffusion=argparse.Namespace(prediction="velocity"))},
        {"metadata": {"config": '{"diffusion.prediction": "velocity"}'}},
    ):
        with pytest.raises(UserError, match="prediction='velocity'"):
            check_objective(PATH, TrainingOptions.of(content))


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (
            DIT,
            {"image_size": 512},
            "image_size=512, but the weights fit DiT-S/2 at 256 pixels.*another|Only the autoencoder factor",
        ),
        (DIT, {"num_classes": 10}, "num_classes=10, but its label table has 1001 rows, for 1000 classes"),
        (DIT, {"num_classes": 1001}, "1001 rows for 1001 classes, but 1002 are needed"),
        (DIT, {"model": "DiT-B/2"}, "model='DiT-B/2', but the weights fit DiT-S/2"),
        (DIT, {"num_heads": 12}, "num_heads=12, .* with num_heads=6"),
        (DIT, {"patch_size": 4}, "patch_size=4, .* with patch_size=2"),
        (MDT, {"decode_layer": 2}, "decode_layer=2, .* with decode_layer=6"),
    ],
)
def test_options_of_another_model_are_refused(config: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_against_config(PATH, options(**values), config)


def test_numbers_of_other_parts_are_not_those_of_the_model() -> None:
    content = {"hyper_parameters": {"vae": {"in_channels": 3, "depth": 2}, "model": {"in_channels": 4}}}
    check_against_config(PATH, TrainingOptions.of(content), DIT)
    content["hyper_parameters"]["model"] = {"in_channels": 16}
    with pytest.raises(UserError, match="in_channels=16"):
        check_against_config(PATH, TrainingOptions.of(content), DIT)


def test_values_of_any_type_are_compared() -> None:
    check_against_config(PATH, options(image_size=[256, 256], num_classes="1000", mlp_ratio=4, model=["DiT-S/2"]), DIT)
    for value in ([256, 512], torch.ones(3), "large", True):
        with pytest.raises(UserError, match="image_size="):
            check_against_config(PATH, options(image_size=value), DIT)


def test_what_is_assumed_and_what_is_ignored_is_told() -> None:
    (assumed,) = option_notes(options(), DIT)
    assert "noise (epsilon) prediction" in assumed
    assert "assumed, as in the released DiT" in assumed
    assert option_notes(options(prediction="eps"), DIT) == []
    notes = option_notes(options(model="my-dit", vae="sdxl-vae", tiger=1, lion=None, lr=3), DIT)
    assert "assumed" in notes[0]
    assert notes[1:] == [
        "the file names its model 'my-dit', which is not known here; its weights fit DiT-S/2",
        "it was trained on latents with vae='sdxl-vae'; check that --autoencoder encodes to the same latents",
        "training options that are not known here and were ignored: tiger",
    ]

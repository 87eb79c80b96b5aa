"""Averages of other widths: from a real training's snapshots, of a fine-tuned model, and in a sweep."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edt_core.config import SampleConfig, TrainConfig
from edt_core.errors import UserError
from edt_core.models import model_config
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import EMA_WEIGHTS
from edt_core.training.posthoc import snapshots
from edt_core.training.start.trainable import merged
from jobs.commands import evaluate_model
from jobs.commands.sweep import check_settings, grid, parse_axis, repeated_settings
from jobs.models.initial import initial_source
from jobs.models.open import load_model
from jobs.models.posthoc import make_average, training_of
from jobs.stages import train
from tests.support.jobs import TRAIN, Chain, execute
from tests.support.local_ray import local_ray_train

WIDTHS = {"ema_widths": (0.05, 0.1), "ema_snapshots": 6}
ROUNDING = 2.0**-8  # of bfloat16, and of the sum


@pytest.fixture(scope="module")
def averaged(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A training of six steps with a snapshot after each."""
    config = TRAIN.model_copy(update={**WIDTHS, "masked_loss": False})
    with local_ray_train():
        return execute(train.STAGE, config, tmp_path_factory.mktemp("averaged"), latents=chain["latents"])


def final(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.path(f"{artifact.counts['final']}/{EMA_WEIGHTS}"))


def tracked(artifact: Artifact, width: float) -> dict[str, torch.Tensor]:
    last = artifact.counts["checkpoints"][-1]
    return load_file(artifact.path(f"checkpoints/{last}/ema-width-{width}.safetensors"))


def near(value: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(value, expected, rtol=ROUNDING, atol=1e-6)


def test_an_average_of_a_tracked_width_is_the_tracked_one(averaged: Artifact, tmp_path: Path) -> None:
    assert averaged.counts["ema_snapshots"] == {"widths": [0.05, 0.1], "steps": [1, 2, 3, 4, 5, 6]}
    training = training_of(averaged.folder.uri, str(tmp_path))
    made = make_average(training, 0.1, lambda _: Folder.at(tmp_path / "out"))
    average, ours, ordinary = tracked(averaged, 0.1), final(made), final(averaged)
    assert ours.keys() == ordinary.keys() > average.keys()
    for name, value in average.items():  # in float32, as the last checkpoint has it
        assert torch.allclose(ours[name], value, rtol=1e-6, atol=1e-7), name
    assert all(torch.equal(ours[name], ordinary[name]) for name in ours.keys() - average.keys()), "never trained"
    assert any(not near(ours[name], ordinary[name]) for name in average)
    assert training.rounding(training.mixture(0.1)) < 1e-6 < training.rounding(training.mixture(0.07)) < 1
    assert (made.counts["ema_std"], made.counts["ema_error"]) == (0.1, pytest.approx(0, abs=1e-6))
    assert not {"checkpoints", "best", "ema_snapshots"} & made.counts.keys()
    loaded = load_model(made.folder.uri)
    assert all(torch.equal(loaded.model.state_dict()[name], value) for name, value in ours.items())
    assert make_average(training, 0.1, lambda _: Folder.at(tmp_path / "out")).manifest == made.manifest
    with pytest.raises(UserError, match="already contains an artifact"):
        make_average(training, 0.07, lambda _: Folder.at(tmp_path / "out"))


def test_widths_out_of_reach_are_refused_with_those_that_there_are(averaged: Artifact, tmp_path: Path) -> None:
    training = training_of(averaged.folder.uri, str(tmp_path))
    with pytest.raises(UserError, match=r"of width 0\.01 only with an error of .*of the widths 0\.05, 0\.1"):
        make_average(training, 0.01, lambda _: Folder.at(tmp_path / "out"))
    with pytest.raises(UserError, match=r"at most 0\.28"):
        make_average(training, 0.5, lambda _: Folder.at(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_training_without_snapshots_is_refused_with_the_field(
    trained: Artifact, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"has no snapshots of averages; train with train\.ema_widths"):
        training_of(trained.folder.uri, str(tmp_path))
    with pytest.raises(UserError, match="is not a training"):
        training_of(str(folder), str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_snapshot_is_one_clear_error(averaged: Artifact, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(averaged.folder.uri, tmp_path / "copy"))
    name = "snapshots/step-00000004/ema-width-0.05.safetensors"
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-9] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=r"step-00000004/ema-width-0\.05\.safetensors"):
        make_average(training_of(str(copy), str(tmp_path)), 0.07, lambda _: Folder.at(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_fine_tuned_model_keeps_its_base(
    folder: Path, latents_artifact: Artifact, tmp_path: Path, training_here: None
) -> None:
    """Its checkpoints hold few tensors, with the scales apart; the average is a whole model with the scales merged."""
    config = TrainConfig.model_validate(
        {**TRAIN.model_dump(), **WIDTHS, "init_from": str(folder), "trainable": "difffit", "lr": 1e-2, "num_workers": 1}
    )
    source = initial_source(config)
    assert source is not None
    inputs = {"latents": latents_artifact, "init": source}
    identity = train.STAGE.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
    out = ArtifactWriter(Folder.at(tmp_path / "tuned"), "checkpoint", identity)
    artifact = train.STAGE.execute(config, inputs, out, Silent())
    made = make_average(training_of(artifact.folder.uri, ""), 0.1, lambda _: Folder.at(tmp_path / "out"))
    base = load_model(str(folder)).model.state_dict()
    expected = merged({**base, **tracked(artifact, 0.1)})
    ours = final(made)
    assert ours.keys() == expected.keys()
    assert all(torch.allclose(ours[name], value, rtol=2 * ROUNDING, atol=1e-6) for name, value in expected.items())
    assert torch.equal(ours["blocks.0.attn.qkv.weight"], base["blocks.0.attn.qkv.weight"])
    assert not torch.equal(ours["blocks.0.attn.proj.weight"], base["blocks.0.attn.proj.weight"])


# --- a sweep


def test_a_width_is_one_more_axis() -> None:
    points = list(grid(SampleConfig(), [parse_axis("ema=off,0.05"), parse_axis("cfg=1,2")]))
    assert [(point.ema, point.config.cfg_scale) for point in points] == [(None, 1), (None, 2), (0.05, 1), (0.05, 2)]
    assert points[2].settings == {"ema": "0.05", "cfg": "1"}
    model = model_config("EDT-S/2")
    check_settings(points, model)
    assert repeated_settings(points, model) == []
    with pytest.raises(UserError, match=r"a width is a number such as 0\.08, or off"):
        parse_axis("ema=wide")
    with pytest.raises(UserError, match=r"ema=0\.05,0\.050: both have the same effect"):
        check_settings(list(grid(SampleConfig(), [parse_axis("ema=0.05,0.050")])), model)


@pytest.mark.usefixtures("here")
def test_a_sweep_over_widths_makes_each_model_once(
    averaged: Artifact, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    reconstruct = snapshots.reconstructed
    monkeypatch.setattr(snapshots, "reconstructed", lambda parts: made.append(parts) or reconstruct(parts))
    arguments = [averaged.folder.uri, str(tmp_path / "out")]
    arguments += ["--images", chain["images"].folder.uri, "--classifier", chain["classifier"].folder.uri]
    arguments += ["--autoencoder", chain["autoencoder"].folder.uri, "--num-samples", "12", "--unit-size", "12"]
    arguments += ["--num-sampling-steps", "2", "--num-cpus-per-worker", "0", "--metrics", "kid"]
    evaluate_model.main([*arguments, "--sweep", "ema=off,0.07", "cfg=1,2"], "edt evaluate")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [result["settings"] for result in results] == [
        {"ema": "off", "cfg": "1"},
        {"ema": "off", "cfg": "2"},
        {"ema": "0.07", "cfg": "1"},
        {"ema": "0.07", "cfg": "2"},
    ]
    assert {result["model"] for result in results} == {averaged.folder.uri}
    values = [result["metrics"]["kid_classifier"] for result in results]
    assert values[0] != values[2]
    assert len(made) == 1
    (made_model,) = (tmp_path / "out" / "checkpoint").iterdir()
    assert Artifact.open(str(made_model)).counts["ema_std"] == 0.07
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| ema | cfg | kid_classifier |" in table
    with pytest.raises(SystemExit) as refused:
        evaluate_model.main([*arguments, "--sweep", "ema=0.001"], "edt evaluate")
    assert refused.value.code == 2

"""A training of a model whose fields are overridden: its checkpoint, resume, folder, program and record."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.models import ModelConfig, count_macs, shadow
from edt_core.pipeline import EDTPipeline
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.training.checkpoint import ema_model
from jobs.commands.options import given_fields, validated
from jobs.commands.stage import make_parser
from jobs.models.initial import initial_source
from jobs.stages import train
from jobs.stages.sample import model_config_of
from tests.support.jobs import Chain
from tests.support.local_training import trained_here
from tests.support.models import pipeline_folder
from tests.support.pipelines import quiet

OVERRIDES: dict[str, Any] = {
    "token_enhancement": False,
    "position_supplement": False,
    "input_mask_ratio": [0.3, 0.5],
    "down_mask_ratios": [],
    "mid_mask_block": 1,
}
RECIPE: dict[str, Any] = {
    "model": "EDT-Tiny/2",
    "global_batch_size": 4,
    "max_steps": 2,
    "lr": 1e-3,
    "checkpoint_every": 1,
    "log_every": 1,
}
CONFIG = TrainConfig(**RECIPE, model_overrides=OVERRIDES)


@pytest.fixture(scope="module")
def made(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return trained_here(CONFIG, chain["latents"], tmp_path_factory.mktemp("overridden") / "whole")


def test_the_artifact_says_which_model_it_is(made: Artifact, chain: Chain) -> None:
    assert made.counts["model_overrides"] == OVERRIDES
    config = ModelConfig.from_dict(model_config_of(made))
    assert config == train.config_of(CONFIG, chain["latents"].counts)
    assert [site.module for site in config.mask_sites] == ["x_embedder", "blocks.1"]
    assert made.counts["macs"] == count_macs(shadow(config))
    names = set(ema_model(made.directory(made.counts["final"])).state_dict())
    assert not [name for name in names if name.startswith("down_blocks") and not name.endswith("reduction.weight")]


def test_a_training_that_is_killed_and_resumed_is_the_same(
    made: Artifact, chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edt_core.training.trainer import Trainer

    step = Trainer.train_step

    def killed_after_one(self: Any, batch: Any, draws: Any) -> Any:
        if batch.step:
            raise MemoryError("killed")
        return step(self, batch, draws)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed_after_one)
        with pytest.raises(MemoryError):
            trained_here(CONFIG, chain["latents"], tmp_path / "cut")
    assert trained_here(CONFIG, chain["latents"], tmp_path / "cut").manifest.digest == made.manifest.digest


def test_its_folder_is_the_same_model(made: Artifact, tmp_path: Path) -> None:
    model = ema_model(made.directory(made.counts["final"])).eval()
    folder = pipeline_folder(tmp_path, model)
    loaded: Any = quiet(EDTPipeline.from_pretrained(folder)).transformer.edt
    assert loaded.config == model.config
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 500.0, 999.0])
    with torch.no_grad():
        assert torch.equal(loaded(x, t, torch.arange(3)), model(x, t, torch.arange(3)))


def test_it_is_another_training_and_the_default_is_the_same_one(chain: Chain) -> None:
    def identity(**fields: Any) -> str:
        return train.STAGE.fingerprint(TrainConfig(**RECIPE, **fields), {"latents": chain["latents"].fingerprint})

    assert identity(model_overrides={}) == identity() != identity(model_overrides=OVERRIDES)
    backwards = dict(reversed(OVERRIDES.items()))
    assert identity(model_overrides=backwards) == identity(model_overrides=OVERRIDES)


def test_a_model_with_other_parts_is_no_start(made: Artifact, chain: Chain, tmp_path: Path) -> None:
    config = TrainConfig(**RECIPE, init_from=made.folder.uri)
    inputs: dict[str, Any] = {"latents": chain["latents"], "init": initial_source(config)}
    out = ArtifactWriter(Folder.at(tmp_path / "out"), "checkpoint", "c" * 64)
    with pytest.raises(UserError, match="token_enhancement False, and the new model has True"):
        train.STAGE.execute(config, inputs, out, Silent())


def test_the_command_takes_them() -> None:
    text = json.dumps(OVERRIDES)
    options = make_parser(train.STAGE, "edt train").parse_args(["latents", "out", "--model-overrides", text])
    config = validated(TrainConfig, given_fields(options, TrainConfig))
    assert config.model_overrides == OVERRIDES

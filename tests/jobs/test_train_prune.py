"""A training that learns which blocks to keep, as the train stage does it: its artifact is the cut model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.files.tensor_files import load_tensors
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.training.trainer import Trainer
from jobs.models.initial import initial_source
from jobs.stages import train

CONFIG = TrainConfig(
    model="EDT-Tiny/2",
    global_batch_size=8,
    max_steps=3,
    log_every=1,
    checkpoint_every=1,
    masked_loss=False,
    prune=(1, 2),
)


def made(config: TrainConfig, inputs: dict[str, Any], folder: Path) -> Artifact:
    identity = train.STAGE.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
    return train.STAGE.execute(config, inputs, ArtifactWriter(Folder.at(folder), "checkpoint", identity), Silent())


def _killed(*_: object) -> None:
    raise MemoryError("killed")


@pytest.mark.usefixtures("training_here")
def test_killed_and_resumed_it_makes_the_same_cut_and_a_training_starts_from_it(
    trained: Artifact, latents_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept weights are those of the model before, bit for bit; the next training has the depth of the cut."""
    config = CONFIG.model_copy(update={"init_from": trained.folder.uri})
    inputs: dict[str, Any] = {"latents": latents_artifact, "init": initial_source(config)}
    whole, step = made(config, inputs, tmp_path / "whole"), Trainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer, "train_step", lambda self, batch, draws: step(self, batch, draws) if batch.step < 2 else _killed()
        )
        with pytest.raises(MemoryError):
            made(config, inputs, tmp_path / "cut")
    cut = made(config, inputs, tmp_path / "cut")
    assert cut.manifest.digest == whole.manifest.digest
    assert not [name for name in cut.data.walk() if name.startswith(".")]
    assert (cut.counts["final"], cut.counts["model_overrides"]) == ("pruned", {"depths": [1, 1, 1, 1, 1]})
    before = load_tensors(trained.path(f"{trained.counts['final']}/ema.safetensors"))
    after = load_tensors(cut.path("pruned/ema.safetensors"))
    for number, block in enumerate(cut.counts["pruned"]["kept_blocks"]):
        name = "attn.qkv.weight"
        assert torch.equal(after[f"blocks.{number}.{name}"], before[f"blocks.{block}.{name}"])
    further = TrainConfig(
        model="EDT-Tiny/2",
        model_overrides={"depths": (1, 1, 1, 1, 1)},
        global_batch_size=8,
        max_steps=1,
        init_from=cut.folder.uri,
    )
    tuned = made(further, {"latents": latents_artifact, "init": initial_source(further)}, tmp_path / "tuned")
    assert tuned.counts["parameters"] == cut.counts["parameters"] < trained.counts["parameters"]
    deep = further.model_copy(update={"model_overrides": {}})
    with pytest.raises(UserError, match=r"it has depths \(1, 1, 1, 1, 1\), and the new model has \(2, 1, 1, 1, 2\)"):
        made(deep, {"latents": latents_artifact, "init": initial_source(deep)}, tmp_path / "deep")


def test_without_a_model_to_start_from_there_is_nothing_to_prune(latents_artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.init_from is not, so there is no model to prune; .* use `edt prune`"):
        made(CONFIG, {"latents": latents_artifact}, tmp_path)

"""A distillation as the train stage does it: its teacher is the model that it starts from."""

from pathlib import Path
from typing import Any

import pytest

from edt_core.config import ChainConfig, DistillConfig, TrainConfig
from edt_core.errors import UserError
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
    min_snr_gamma=None,
    timestep_sampler="uniform",
    distill=DistillConfig(steps=2, teacher=ChainConfig(sampler="ddim", num_sampling_steps=4, cfg_scale=2.0)),
)


def _killed(*_: object) -> None:
    raise MemoryError("killed")


@pytest.mark.usefixtures("training_here")
def test_killed_and_resumed_it_makes_the_same_student(
    trained: Artifact, latents_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is read again by the attempt that resumes, and nothing of it is left beside the student."""
    config = CONFIG.model_copy(update={"init_from": trained.folder.uri})
    inputs: dict[str, Any] = {"latents": latents_artifact, "init": initial_source(config)}
    identity = train.STAGE.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})

    def made(name: str) -> Artifact:
        out = ArtifactWriter(Folder.at(tmp_path / name), "checkpoint", identity)
        return train.STAGE.execute(config, inputs, out, Silent())

    whole, step = made("whole"), Trainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer, "train_step", lambda self, batch, draws: step(self, batch, draws) if batch.step < 2 else _killed()
        )
        with pytest.raises(MemoryError):
            made("cut")
    cut = made("cut")
    assert cut.manifest.digest == whole.manifest.digest
    assert set(cut.manifest.inputs) == {"latents", "init"}
    assert not [name for name in cut.data.walk() if name.startswith(".")]
    assert whole.counts["training_flops"] > 3 * 8 * 2 * 4 * whole.counts["macs"]  # the teacher's calls are in it


def test_without_a_model_to_start_from_there_is_no_teacher(latents_artifact: Artifact, tmp_path: Path) -> None:
    out = ArtifactWriter(Folder.at(tmp_path), "checkpoint", "0" * 64)
    with pytest.raises(UserError, match=r"train\.init_from is not, so there is no teacher; .* use `edt distill`"):
        train.STAGE.execute(CONFIG, {"latents": latents_artifact}, out, Silent())

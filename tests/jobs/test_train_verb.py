"""The verb `train` as a person gives it: what it would take, what it refuses, what it depends on, and how it fails."""

import re
from pathlib import Path

import pytest

from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from jobs.stages import train
from tests.support.jobs import Chain, command

CONFIG = TrainConfig(model="EDT-Tiny/2", global_batch_size=8, max_steps=4, log_every=2, checkpoint_every=2)


def test_a_dry_run_tells_what_it_would_take(latents_artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = command(
        "train", latents_artifact.folder.uri, str(out), "--model", "EDT-Tiny/2", "--max-epochs", "3", "--dry-run"
    )
    assert done.returncode == 0, done.stderr
    told = {line.split("  ")[1]: line.split("  ")[-1].strip() for line in done.stdout.splitlines()[1:]}
    assert told["images"] == "96"
    assert told["steps"] == "2 of 256 images, 5.3 epochs"
    assert told["memory per worker"].startswith("about ")
    assert {"parameters", "MACs per image", "training FLOPs per image", "checkpoint", "steps per epoch"} <= told.keys()
    assert not out.exists()


def test_a_dry_run_for_gpus_tells_what_fits_on_which(latents_artifact: Artifact, tmp_path: Path) -> None:
    words = ("--model", "EDT-Tiny/2", "--num-workers", "2", "--use-gpu", "true", "--shard", "optimizer", "--dry-run")
    done = command("train", latents_artifact.folder.uri, str(tmp_path / "out"), *words)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^  state per worker +\S+ MiB; with shard optimizer \S+ MiB; with shard full \S+ MiB$", done.stdout, re.M
    )
    divided = "".join(f"; with shard {mode} micro-batch 256" for mode in ("optimizer", "full"))
    for card in (24, 40, 80):
        assert re.search(rf"^  fits on {card} GB +micro-batch 256{divided}$", done.stdout, re.M)


def test_an_objective_brings_its_own_recipe(latents_artifact: Artifact, tmp_path: Path) -> None:
    """Flow matching has no min-SNR weight; a weight that is given is refused."""
    words = [
        "train",
        latents_artifact.folder.uri,
        str(tmp_path / "out"),
        "--model",
        "EDT-Tiny/2",
        "--objective",
        "flow",
    ]
    assert command(*words, "--dry-run").returncode == 0
    refused = command(*words, "--min-snr-gamma", "5", "--dry-run")
    assert refused.returncode == 2
    assert "set min_snr_gamma to null" in refused.stderr


def test_a_dry_run_refuses_what_a_run_would(latents_artifact: Artifact, tmp_path: Path) -> None:
    done = command("train", latents_artifact.folder.uri, str(tmp_path / "out"), "--reader", "webdataset", "--dry-run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: train.reader is webdataset")


def test_an_autoencoder_for_pictures_is_no_part_of_the_identity(latents_artifact: Artifact, chain: Chain) -> None:
    latents = {"latents": latents_artifact.fingerprint}
    alone = train.STAGE.fingerprint(CONFIG, latents)
    assert train.STAGE.fingerprint(CONFIG, {**latents, "autoencoder": chain["autoencoder"].fingerprint}) == alone
    assert train.STAGE.fingerprint(CONFIG, {"latents": "0" * 64}) != alone


def test_a_loss_that_stays_not_finite_fails_with_its_story(tmp_path: Path, training_here: None) -> None:
    """Latents that are finite and far too large: every step's loss overflows."""
    import numpy as np

    from edt_core.data.latents import LatentInfo, LatentShardWriter
    from edt_core.data.scale import LatentScale

    out = ArtifactWriter(Folder.at(tmp_path / "latents"), "latents", "e" * 64)

    def write(path: Path) -> int:
        with LatentShardWriter(path, LatentInfo("test", LatentScale(1.0), 32, (4, 8, 8), "images-00000.tar")) as writer:
            huge = np.full((16, 2, 2, 4, 8, 8), 1e30, np.float32)
            writer.write([str(i) for i in range(16)], np.arange(16) % 4, huge)
        return 16

    out.write("latents-00000.arrow", write)
    counts = {"images": 16, "classes": 4, "image_size": 32, "latent_shape": [4, 8, 8], "scaling_factor": 1.0}
    latents = out.commit({}, {}, {**counts, "autoencoder_digest": "0" * 64})
    heard = tmp_path / "heard"

    class Told(Silent):
        def warn(self, message) -> None:
            with heard.open("a") as file:
                file.write(f"{message}\n")

    config = CONFIG.model_copy(update={"max_rollbacks": 1})
    target = ArtifactWriter(Folder.at(tmp_path / "out"), "checkpoint", train.STAGE.fingerprint(config, {}))
    with pytest.raises(RuntimeError, match=r"step 1 is not finite for 8 of 8 samples; no rollback is left") as caught:
        train.STAGE.execute(config, {"latents": latents}, target, Told())
    assert not isinstance(caught.value, UserError)
    warnings = heard.read_text()
    assert "the loss of step 0 is not finite for 8 of 8 samples: rows " in warnings
    assert "rolled back to step 0, continuing without step 0 (rollback 1 of at most 1)" in warnings

"""The verb `train` as a person gives it: what it would take, what it shows on the way, and what it hangs on."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from edt_core.artifact import Artifact, ArtifactWriter
from edt_core.autoencoder import autoencoder_facts, build_autoencoder
from edt_core.config import AutoencoderConfig, TrainConfig
from edt_core.errors import UserError
from edt_core.progress import Silent
from edt_core.storage import Folder
from jobs import autoencoder, train

CONFIG = TrainConfig(
    model="EDT-Tiny/2", global_batch_size=8, max_steps=4, log_every=2, checkpoint_every=2, preview_every=2
)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.train", *arguments], capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    model = build_autoencoder(AutoencoderConfig(downsample_factor=4, base_channels=8), 32)
    saved = tmp_path_factory.mktemp("saved")
    model.save_pretrained(saved)
    out = ArtifactWriter(Folder.at(tmp_path_factory.mktemp("vae")), "autoencoder", "a" * 64)
    out.add_tree(saved, autoencoder.FOLDER)
    return out.commit({}, {}, {**autoencoder_facts(model), "source": "unfitted"})


def test_a_dry_run_tells_what_it_would_take(latents_artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = command(latents_artifact.folder.uri, str(out), "--model", "EDT-Tiny/2", "--max-epochs", "3", "--dry-run")
    assert done.returncode == 0, done.stderr
    told = {line.split("  ")[1]: line.split("  ")[-1].strip() for line in done.stdout.splitlines()[1:]}
    assert told["images"] == "96"
    assert told["steps"] == "2 of 256 images, 5.3 epochs"
    assert told["memory a worker"].startswith("about ")
    assert {"parameters", "MACs an image", "training FLOPs an image", "a checkpoint", "steps an epoch"} <= told.keys()
    assert not out.exists()


def test_a_dry_run_refuses_what_a_run_would(latents_artifact: Artifact, tmp_path: Path) -> None:
    done = command(latents_artifact.folder.uri, str(tmp_path / "out"), "--reader", "webdataset", "--dry-run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: train.reader is webdataset")


def test_an_autoencoder_for_pictures_is_no_part_of_the_identity(latents_artifact: Artifact, vae: Artifact) -> None:
    latents = {"latents": latents_artifact.fingerprint}
    alone = train.VERB.fingerprint(CONFIG, latents)
    assert train.VERB.fingerprint(CONFIG, {**latents, "autoencoder": vae.fingerprint}) == alone
    assert train.VERB.fingerprint(CONFIG, {"latents": "0" * 64}) != alone


@pytest.mark.ray
def test_pictures_metrics_and_checkpoints_are_told_on_the_way(
    latents_artifact: Artifact, vae: Artifact, tmp_path: Path, ray_session: None
) -> None:
    told = tmp_path / "told"

    class Told(Silent):
        """Leaves what it hears in files: the workers have a copy of it."""

        def image(self, name, png, step) -> None:
            told.mkdir(exist_ok=True)
            (told / f"{name}-{step}.png").write_bytes(png)

        def checkpoints(self, kept) -> None:
            told.mkdir(exist_ok=True)
            lines = [f"{step} {uri.rsplit('/', 1)[-1]} {digest}\n" for step, (uri, digest) in sorted(kept.items())]
            (told / f"checkpoints-{max(kept)}").write_text("".join(lines))

    inputs = {"latents": latents_artifact, "autoencoder": vae}
    identity = train.VERB.fingerprint(CONFIG, {role: item.fingerprint for role, item in inputs.items()})
    out = ArtifactWriter(Folder.at(tmp_path / "out"), "checkpoint", identity)
    made = train.VERB.execute(CONFIG, inputs, out, Told())
    assert made.manifest.inputs == {"latents": latents_artifact.fingerprint}
    for step in (2, 4):
        assert Image.open(io.BytesIO((told / f"samples-{step}.png").read_bytes())).size == (128, 128)
    lines = (told / "checkpoints-4").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [["2", "step-00000002"], ["4", "step-00000004"]]
    assert made.counts["best"] in made.counts["checkpoints"]
    assert made.counts["steps"] == 4


@pytest.mark.ray
def test_a_loss_that_stays_not_finite_fails_with_its_story(tmp_path: Path, ray_session: None) -> None:
    """Latents that are finite and far too large: every step's loss overflows."""
    import numpy as np

    from edt_core.data.latents import LatentInfo, LatentShardWriter

    out = ArtifactWriter(Folder.at(tmp_path / "latents"), "latents", "e" * 64)

    def write(path: Path) -> int:
        with LatentShardWriter(path, LatentInfo("test", 1.0, 32, (4, 8, 8), "images-00000.tar")) as writer:
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

    config = CONFIG.model_copy(update={"max_rollbacks": 1, "preview_every": None})
    target = ArtifactWriter(Folder.at(tmp_path / "out"), "checkpoint", train.VERB.fingerprint(config, {}))
    with pytest.raises(RuntimeError, match=r"step 1 is not finite for 8 of 8 samples; max_rollbacks is 1") as caught:
        train.VERB.execute(config, {"latents": latents}, target, Told())
    assert not isinstance(caught.value, UserError)
    warnings = heard.read_text()
    assert "the loss of step 0 is not finite for 8 of 8 samples: rows " in warnings
    assert "rolled back to step 0, going on without step 0 (rollback 1 of at most 1)" in warnings

"""A training that goes on from a shorter one in the same store: the bits are those of the long one from nothing."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edt_core.config import TrainConfig, result_fields
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter, fingerprint
from edt_core.store.folder import Folder
from edt_core.store.layout import HISTORY_NAME
from edt_core.store.store import Store
from edt_core.training.optim import decay_start, learning_rate, stable_steps
from edt_core.training.trainer import Trainer
from jobs.stages import train
from tests.jobs.test_train_init import Heard, source

pytestmark = pytest.mark.usefixtures("training_here")

CONSTANT = TrainConfig(
    model="EDT-Tiny/2",
    global_batch_size=8,
    max_steps=4,
    lr=1e-3,
    lr_schedule="constant",
    log_every=2,
    checkpoint_every=2,
)
WSD = CONSTANT.model_copy(update={"lr_schedule": "wsd", "max_steps": 6, "decay_fraction": 0.5, "lr_final": 1e-5})


def changed(config: TrainConfig, **fields: Any) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), **fields})


def folder_of(root: Path, config: TrainConfig, inputs: Mapping[str, Any]) -> Folder:
    identity = train.STAGE.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
    return Store(Folder.at(root)).folder("checkpoint", identity)


def made(root: Path, config: TrainConfig, latents: Artifact, progress: Silent | None = None, **more: Any) -> Artifact:
    """A training in its place of a store."""
    inputs = {"latents": latents, **more}
    folder = folder_of(root, config, inputs)
    out = Store(Folder.at(root)).writer("checkpoint", folder.uri.rsplit("/", 1)[1])
    return train.STAGE.execute(config, inputs, out, progress or Silent())


def planned(root: Path, config: TrainConfig, latents: Artifact, **more: Any) -> str:
    inputs = {"latents": latents, **more}
    fingerprints = {role: item.fingerprint for role, item in inputs.items()}
    return train.STAGE.continued(folder_of(root, config, inputs), config, fingerprints, {"latents": latents})


@pytest.fixture
def steps_done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are trained, counted from 0."""
    done: list[int] = []
    step = Trainer.train_step

    def counted(self: Trainer, batch: Any, draws: Any) -> Any:
        done.append(batch.step)
        return step(self, batch, draws)

    monkeypatch.setattr(Trainer, "train_step", counted)
    return done


def test_wsd_rises_stays_and_falls_to_its_end_at_the_last_step() -> None:
    config = TrainConfig(lr=1.0, lr_final=0.2, lr_schedule="wsd", warmup_steps=2, decay_fraction=0.4)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert (stable_steps(config, 10), decay_start(config, 10)) == (6, 6)
    assert [learning_rate(config, step, 100) for step in range(6)] == rates[:6]
    assert stable_steps(config.model_copy(update={"lr_schedule": "linear"}), 10) == 0
    root = config.model_copy(update={"decay_shape": "1-sqrt"})
    assert [learning_rate(root, step, 10) for step in range(6)] == rates[:6]
    expected = [0.2 + 0.8 * (1 - math.sqrt(done / 4)) for done in (1, 2, 3, 4)]
    assert [learning_rate(root, step, 10) for step in range(6, 10)] == pytest.approx(expected)
    whole = config.model_copy(update={"decay_fraction": 1.0})
    assert decay_start(whole, 10) is None


def test_a_fraction_is_no_part_of_older_fingerprints() -> None:
    assert train.STAGE.fingerprint(CONSTANT, {}) == train.STAGE.fingerprint(changed(CONSTANT, decay_fraction=0.2), {})
    assert train.STAGE.fingerprint(CONSTANT, {}) != train.STAGE.fingerprint(changed(CONSTANT, decay_fraction=0.3), {})


@pytest.mark.parametrize(
    ("short", "fields", "step"),
    [
        (CONSTANT, {"max_steps": 8}, 4),
        (CONSTANT, {"max_steps": 8, "lr_schedule": "wsd", "decay_fraction": 0.25}, 4),  # then let to decay
        (WSD, {"max_steps": 10}, 3),  # before its decay, where no regular checkpoint is
        (WSD, {"decay_fraction": 0.2, "decay_shape": "1-sqrt"}, 3),  # as long, but a shorter decay of another shape
    ],
)
def test_a_longer_training_has_the_bits_of_one_from_nothing(
    short: TrainConfig,
    fields: dict[str, Any],
    step: int,
    latents_artifact: Artifact,
    tmp_path: Path,
    steps_done: list[int],
) -> None:
    longer = changed(short, **fields)
    before = made(tmp_path / "store", short, latents_artifact)
    assert planned(tmp_path / "nothing", longer, latents_artifact) == ""
    assert (
        planned(tmp_path / "store", longer, latents_artifact) == f"resume from {before.fingerprint[:12]} at step {step}"
    )
    steps_done.clear()
    after = made(tmp_path / "store", longer, latents_artifact)
    assert steps_done == list(range(step, longer.max_steps))
    steps_done.clear()
    alone = made(tmp_path / "nothing", longer, latents_artifact)
    assert steps_done == list(range(longer.max_steps))
    assert after.manifest.digest == alone.manifest.digest
    assert (after.fingerprint, after.counts["images_seen"]) == (alone.fingerprint, alone.counts["images_seen"])
    rows = [json.loads(line)["step"] for line in after.path(HISTORY_NAME).read_text().splitlines()]
    assert rows == list(range(2, longer.max_steps + 1, 2))


def test_device_time_of_the_shared_steps_is_counted(latents_artifact: Artifact, tmp_path: Path) -> None:
    before = made(tmp_path, CONSTANT, latents_artifact)
    manifest = tmp_path / "checkpoint" / before.fingerprint / "manifest.json"
    assert manifest.exists()
    after = made(tmp_path, changed(CONSTANT, max_steps=6), latents_artifact)
    assert after.counts["device_hours"] > before.counts["device_hours"]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"max_steps": 8, "lr": 2e-3}, "another rate"),
        ({"max_steps": 8, "seed": 1}, "another seed"),
        ({"max_steps": 8, "max_hours": 5.0}, "its end depends on the clock"),
        ({"max_steps": 8, "lr_schedule": "linear"}, "its rate depends on its end"),
        ({"max_steps": 8, "checkpoint_every": 3}, "it would have no checkpoint there"),
        ({"max_steps": 8, "log_every": 3}, "another history"),
        ({"max_steps": 2}, "it is shorter, and ends there"),
    ],
)
def test_what_is_not_exact_begins_from_nothing(
    fields: dict[str, Any], why: str, latents_artifact: Artifact, short: Path
) -> None:
    assert planned(short, changed(CONSTANT, **fields), latents_artifact) == "", why


@pytest.fixture(scope="module")
def short(latents_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one short training."""
    from tests.support.local_ray import local_ray_train

    folder = tmp_path_factory.mktemp("short")
    with local_ray_train():
        made(folder, CONSTANT, latents_artifact)
    return folder


def test_an_unfinished_training_of_the_version_before_is_named(
    latents_artifact: Artifact, short: Path, tmp_path: Path
) -> None:
    """Its checkpoints cannot be resumed from: its random numbers were others."""
    inputs = {"latents": latents_artifact.fingerprint}
    out = Store(Folder.at(tmp_path)).writer("checkpoint", fingerprint("checkpoint", 2, result_fields(CONSTANT), inputs))
    committed = next(short.glob("checkpoint/*/*/checkpoints/step-00000002"))
    for file in committed.iterdir():
        out.link(f"checkpoints/step-00000002/{file.name}", file)
    heard = Heard()
    artifact = made(tmp_path, CONSTANT, latents_artifact, heard)
    (message,) = heard.warnings
    assert f"the unfinished one in {out.folder.uri} is of an earlier version" in message
    assert "train.init_from to the folder of checkpoints/step-00000002" in message
    assert artifact.manifest.step_version == 3
    again = Heard()
    made(tmp_path / "other", CONSTANT, latents_artifact, again)
    assert again.warnings == []


def test_epochs_are_counted_where_the_latents_are_there(latents_artifact: Artifact, short: Path) -> None:
    """96 latents in batches of 8: half an epoch is 6 steps."""
    config = changed(CONSTANT, max_steps=100, max_epochs=0.5)
    assert planned(short, config, latents_artifact).endswith(" at step 4")
    inputs = {"latents": latents_artifact}
    fingerprints = {"latents": latents_artifact.fingerprint}
    assert train.STAGE.continued(folder_of(short, config, inputs), config, fingerprints, {}) == ""


def test_other_latents_and_another_base_model_begin_from_nothing(
    latents_artifact: Artifact, short: Path, folder: Path
) -> None:
    config = changed(CONSTANT, max_steps=8)
    assert planned(short, config, latents_artifact)
    place = folder_of(short, config, {"latents": latents_artifact})
    assert train.STAGE.continued(place, config, {"latents": "0" * 64}, {}) == ""
    assert planned(short, config, latents_artifact, init=source(folder)) == ""


@pytest.mark.parametrize("fields", [{}, {"trainable": "difffit"}])
def test_a_training_from_a_model_goes_on_too(
    latents_artifact: Artifact, folder: Path, tmp_path: Path, steps_done: list[int], fields: dict[str, str]
) -> None:
    init, config = source(folder), changed(CONSTANT, init_from=str(folder), **fields)
    made(tmp_path / "store", config, latents_artifact, init=init)
    longer = changed(config, max_steps=6)
    steps_done.clear()
    after = made(tmp_path / "store", longer, latents_artifact, init=init)
    assert steps_done == [4, 5]
    assert after.manifest.digest == made(tmp_path / "nothing", longer, latents_artifact, init=init).manifest.digest


def test_a_damaged_checkpoint_is_not_used(
    latents_artifact: Artifact, short: Path, tmp_path: Path, steps_done: list[int]
) -> None:
    """Bytes of its weights are flipped: the one before it serves, and where there is none, nothing does."""
    shutil.copytree(short, tmp_path / "store")
    places = sorted((tmp_path / "store").glob("checkpoint/*/*/checkpoints/step-*"))
    assert len(places) == 2
    longer, heard = changed(CONSTANT, max_steps=6), Heard()
    for place, first in ((places[1], 2), (places[0], 0)):
        weights = place / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.unlink()
        weights.write_bytes(bytes(data))
        steps_done.clear()
        after = made(tmp_path / "store", longer, latents_artifact, heard)
        assert steps_done == list(range(first, 6))
        assert f"{place.name}/model.safetensors does not match its digest" in heard.warnings[-1]
        shutil.rmtree(tmp_path / "store" / "checkpoint" / after.fingerprint)


def test_a_training_outside_a_store_looks_nowhere(latents_artifact: Artifact, tmp_path: Path) -> None:
    config = changed(CONSTANT, max_steps=6)
    identity = train.STAGE.fingerprint(config, {"latents": latents_artifact.fingerprint})
    out = ArtifactWriter(Folder.at(tmp_path / "out"), "checkpoint", identity)
    assert train.shared(out.folder, config, {"latents": latents_artifact.fingerprint}, 96) == []

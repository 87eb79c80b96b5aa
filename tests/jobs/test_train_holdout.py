"""Held-out images from the image artifact to the manifest: which they are, where they are counted, what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edt_core.config import PreprocessConfig, SourceConfig, result_fields
from edt_core.data.digits import write_digits
from edt_core.data.holdout import choose_held_out
from edt_core.data.latents import LatentDataset
from edt_core.errors import UserError
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.layout import HISTORY_NAME
from edt_core.store.store import Store
from jobs.stages import preprocess, train
from jobs.stages.holdout.split import held_out, images_of, settled_alone, training_images
from jobs.stages.preprocess import image_source
from jobs.stages.reuse.originals import Originals
from tests.jobs.test_train_init import Heard
from tests.jobs.test_train_on import CONSTANT, changed, made
from tests.support.jobs import STAGES, Chain, command
from tests.support.local_ray import local_ray, local_ray_train

CONFIG = changed(CONSTANT, holdout=0.4, validate_every=2)
SHARDS = PreprocessConfig(image_size=32, images_per_shard=48)


def folder_of_digits(folder: Path, each: int) -> Path:
    whole = write_digits(folder / "whole")
    for label in "0123":
        (folder / "digits" / label).mkdir(parents=True)
        for path in sorted((whole / label).iterdir())[:each]:
            shutil.copy(path, folder / "digits" / label)
    return folder / "digits"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Images and latents of 200 digits in a store, one file of which is no image."""
    folder = folder_of_digits(tmp_path_factory.mktemp("source"), 50)
    (folder / "1" / "zzz.png").write_bytes(b"no image")
    store = Store(Folder.at(tmp_path_factory.mktemp("parts") / "store"))
    chain: dict[str, Any] = {"source": image_source(SourceConfig(path=str(folder)))}
    stages = {**STAGES, "images": (preprocess.STAGE, SHARDS.model_copy(update={"max_bad_fraction": 0.1}), ("source",))}
    with local_ray():
        for kind in ("images", "autoencoder", "latents"):
            stage, config, roles = stages[kind]
            inputs = {role: chain[role] for role in roles}
            identity = stage.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
            chain[kind] = stage.execute(config, inputs, store.writer(kind, identity), Silent())
    return chain


@pytest.fixture(scope="module")
def artifact(parts: Chain, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A training that holds images out."""
    with local_ray_train():
        return made(tmp_path_factory.mktemp("trained"), CONFIG, parts["latents"])


def test_a_streamed_training_holds_out_and_counts_the_same_images(
    parts: Chain, artifact: Artifact, tmp_path: Path
) -> None:
    config = changed(CONFIG, reader="stream", num_canonical_nodes=2, shuffle_block=1)
    with local_ray_train():
        streamed = made(tmp_path, config, parts["latents"])
    assert streamed.counts["class_counts"] == artifact.counts["class_counts"]
    found, of_mapped = ({**each.counts["holdout"]} for each in (streamed, artifact))
    assert found.pop("loss") == pytest.approx(of_mapped.pop("loss"), rel=0.2)  # of other batches
    assert found == of_mapped
    assert streamed.fingerprint != artifact.fingerprint


def test_the_rows_are_those_whose_originals_are_chosen(parts: Chain) -> None:
    holdout = held_out(CONFIG, parts)
    assert holdout is not None
    originals = Originals.of(parts["images"])
    digests = originals.digests[originals.row >= 0]
    assert len(originals.digests) == 201
    assert np.array_equal(holdout.rows, choose_held_out(digests, 0.4).rows)
    assert 64 <= len(holdout.rows) <= 100
    assert training_images(CONFIG, parts) == 200 - len(holdout.rows)
    assert training_images(changed(CONFIG, holdout=0), parts) == 200
    assert training_images(CONFIG, {}) is None
    first = next(iter(digests[holdout.measured]))
    assert bytes(first) == min(bytes(row) for row in digests)


def test_images_that_are_added_move_no_other(parts: Chain, tmp_path: Path) -> None:
    """By the sha256 of the originals, in another artifact with more of them, in another order of rows."""
    with local_ray():
        source = image_source(SourceConfig(path=str(folder_of_digits(tmp_path, 70))))
        out = Store(Folder.at(tmp_path / "store")).writer("images", "0" * 64)
        more = preprocess.STAGE.execute(SHARDS, {"source": source}, out, Silent())
    sides = []
    for images in (parts["images"], more):
        originals = Originals.of(images)
        digests = originals.digests[originals.row >= 0]
        rows = set(choose_held_out(digests, 0.4).rows.tolist())
        sides.append({bytes(digest): row in rows for row, digest in enumerate(digests)})
    before, after = sides
    assert len(after) > len(before)
    assert {digest: after[digest] for digest in before} == before


def test_held_out_images_are_trained_on_by_nobody_and_counted(
    parts: Chain, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holdout = held_out(CONFIG, parts)
    assert holdout is not None
    seen: set[int] = set()
    monkeypatch.setattr("edt_core.training.loop.require_finite", lambda batch: seen.update(batch.indices.tolist()))
    with local_ray_train():
        whole = made(tmp_path, changed(CONFIG, max_steps=1000, max_epochs=1), parts["latents"])
    trained_on = 200 - len(holdout.rows)
    assert whole.counts["steps"] == -(-trained_on // 8)
    assert seen == set(range(200)) - set(holdout.rows.tolist())
    rows = [json.loads(line) for line in artifact.path(HISTORY_NAME).read_text().splitlines()]
    assert [row["step"] for row in rows if "holdout_loss" in row] == [2, 4]
    assert artifact.counts["holdout"] == {
        "images": len(holdout.rows),
        "training_images": trained_on,
        "measured": len(holdout.rows),
        "every": 2,
        "loss": rows[-1]["holdout_loss"],
    }
    labels = LatentDataset(parts["latents"].paths("*.arrow")).labels
    assert artifact.counts["class_counts"] == np.bincount(np.delete(labels, holdout.rows), minlength=4).tolist()
    assert sum(artifact.counts["class_counts"]) == trained_on
    scores = {f"step-{int(row['step']):08d}": row["holdout_loss"] for row in rows if "holdout_loss" in row}
    assert artifact.counts["best"] == min(scores, key=lambda name: scores[name])
    assert artifact.manifest.config["holdout"] == 0.4
    assert not [entry.path for entry in artifact.entries() if "classes" in entry.path]


def test_nothing_of_it_is_in_a_training_without(parts: Chain, tmp_path: Path) -> None:
    with local_ray_train():
        plain = made(tmp_path, changed(CONFIG, holdout="auto").settled(200), parts["latents"])
    assert "holdout" not in plain.counts
    assert plain.counts["class_counts"] == parts["latents"].counts["class_counts"]
    assert not {"holdout", "validate_every"} & set(plain.manifest.config)
    assert "holdout" not in plain.path(HISTORY_NAME).read_text()


def test_the_command_finds_the_images_in_the_store_of_the_latents(parts: Chain, tmp_path: Path) -> None:
    found = images_of(parts["latents"])
    assert found is not None
    assert found.fingerprint == parts["images"].fingerprint
    arguments = ["--model", "EDT-Tiny/2", "--max-steps", "2", "--global-batch-size", "8", "--holdout", "0.4"]
    with local_ray_train():
        done = command("train", parts["latents"].folder.uri, str(tmp_path / "out"), *arguments)
    assert done.returncode == 0, done.stderr
    assert Artifact.open(str(tmp_path / "out")).counts["holdout"]["training_images"] == training_images(CONFIG, parts)
    planned = command("train", parts["latents"].folder.uri, str(tmp_path / "plan"), *arguments, "--dry-run")
    assert f"images                    {training_images(CONFIG, parts)}\n" in planned.stdout


def moved(latents: Artifact, to: Path) -> Artifact:
    """Latents that are in no store."""
    assert latents.folder.local is not None
    shutil.copytree(latents.folder.local, to)
    return Artifact.open(str(to))


def test_without_the_images_a_share_is_refused_and_the_default_holds_out_nothing(
    parts: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = moved(parts["latents"], tmp_path / "latents")
    done = command("train", str(tmp_path / "latents"), str(tmp_path / "out"), "--holdout", "0.4")
    assert done.returncode == 2
    assert "chosen by the sha256 of their originals; give the images artifact (--images)" in done.stderr
    assert held_out(CONFIG, {"latents": latents, "images": parts["images"]}) is not None
    heard = Heard()
    monkeypatch.setattr("edt_core.config.AUTO_HOLDOUT_FROM", 200)
    auto = changed(CONFIG, holdout="auto")
    assert settled_alone(auto, {"latents": latents}, heard).holdout_share == 0
    assert "no images are held out, because the images of" in heard.warnings[0]
    quiet = Heard()
    assert settled_alone(auto, {"latents": latents, "images": parts["images"]}, quiet).holdout_share == 0.01
    assert settled_alone(auto, {"latents": parts["latents"]}, quiet).holdout_share == 0.01
    assert quiet.warnings == []


def test_the_images_of_other_latents_are_refused(parts: Chain) -> None:
    images = parts["images"]
    others = replace(images, manifest=replace(images.manifest, fingerprint="0" * 64))
    with pytest.raises(UserError, match="is not the one that the latents"):
        held_out(CONFIG, {"latents": parts["latents"], "images": others})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"holdout": 0.5, "global_batch_size": 150}, "for the training, fewer than a batch of 150"),
        ({"holdout": 1.5}, "holdout is 1.5"),
        ({"validate_every": 0}, "validate_every"),
    ],
)
def test_what_cannot_be_is_refused_with_one_message_before_any_worker(
    fields: dict[str, Any], says: str, parts: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "_fit", lambda *_: pytest.fail("workers were started"))
    options = [part for name, value in fields.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    done = command("train", parts["latents"].folder.uri, str(tmp_path / "out"), *options)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("error:") == 1


# --- going on


@pytest.mark.parametrize(
    ("fields", "at"),
    [({"max_steps": 8}, 4), ({"max_steps": 8, "validate_every": 3}, 0), ({"max_steps": 8, "holdout": 0.45}, 0)],
)
def test_a_longer_training_goes_on_with_the_same_holdout(
    fields: dict[str, Any], at: int, parts: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    monkeypatch.setattr("edt_core.training.loop.require_finite", lambda batch: done.append(batch.step))
    with local_ray_train():
        made(tmp_path / "store", CONFIG, parts["latents"])
        done.clear()
        longer = changed(CONFIG, **fields)
        after = made(tmp_path / "store", longer, parts["latents"])
        assert min(done) == at
        alone = made(tmp_path / "nothing", longer, parts["latents"])
    assert after.manifest.digest == alone.manifest.digest


def test_an_end_between_two_measurements_is_not_gone_on_from(
    parts: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shorter training measured at its end, where the longer one does not: their histories differ."""
    done: list[int] = []
    monkeypatch.setattr("edt_core.training.loop.require_finite", lambda batch: done.append(batch.step))
    config = changed(CONFIG, validate_every=6)
    with local_ray_train():
        made(tmp_path / "store", config, parts["latents"])
        done.clear()
        longer = changed(config, max_steps=8)
        after = made(tmp_path / "store", longer, parts["latents"])
        assert min(done) == 2  # from the checkpoint before
        alone = made(tmp_path / "nothing", longer, parts["latents"])
    assert after.manifest.digest == alone.manifest.digest


def test_the_fingerprint_has_the_share_and_is_otherwise_that_of_before(parts: Chain) -> None:
    inputs = {"latents": parts["latents"].fingerprint}
    none = train.STAGE.fingerprint(changed(CONFIG, holdout=0, validate_every=None), inputs)
    few = changed(CONFIG, holdout="auto", validate_every=None)
    assert train.STAGE.fingerprint(few.settled(200), inputs) == none
    many = few.settled(20_000)
    assert train.STAGE.fingerprint(many, inputs) != none
    assert result_fields(many)["holdout"] == 0.01
    assert train.STAGE.fingerprint(many, {**inputs, "images": "a" * 64}) == train.STAGE.fingerprint(many, inputs)

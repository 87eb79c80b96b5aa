"""What training refuses before its first step: latents that are not the manifest's, and shards that a reader lacks."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset, LatentInfo, LatentShard, LatentShardWriter, write_latent_tar
from edt_core.data.scale import LatentScale
from edt_core.data.streaming.tars import TarStream
from edt_core.errors import UserError
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, ArtifactWriter, ManifestError
from edt_core.store.folder import Folder
from jobs.stages import train
from jobs.stages.training.latents import open_latents

SHARDS, ROWS = 3, 24
NAMES = [f"latents-{k:05d}.arrow" for k in range(SHARDS)]
CONFIG = TrainConfig(model="EDT-Tiny/2", global_batch_size=8, max_steps=2, log_every=1)
COUNTS = {
    "images": SHARDS * ROWS,
    "classes": 4,
    "image_size": 32,
    "latent_shape": [4, 8, 8],
    "scaling_factor": 0.5,
    "autoencoder_digest": "0" * 64,
}


def write_latents(folder: Path, tars: bool = True) -> Artifact:
    """Three shards of the same number of rows and of bytes: only their digests tell them apart."""
    out, rng = ArtifactWriter(Folder.at(folder), "latents", "f" * 64), np.random.default_rng(0)
    for k, name in enumerate(NAMES):
        info = LatentInfo("test", LatentScale(0.5), 32, (4, 8, 8), f"images-{k:05d}.tar")
        posterior = rng.normal(size=(ROWS, 2, 2, 4, 8, 8)).astype(np.float32)
        rows = [f"{k}-{i:04d}" for i in range(ROWS)], rng.integers(0, 4, ROWS), posterior

        def write(path: Path, info: LatentInfo = info, rows: Any = rows) -> int:
            with LatentShardWriter(path, info) as writer:
                writer.write(*rows)
            return writer.rows

        out.write(name, write)
        if tars:
            shard = LatentShard(folder / name)
            out.write(f"latents-{k:05d}.tar", lambda path, shard=shard: write_latent_tar(path, shard))
    return out.commit({}, {}, COUNTS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    made = write_latents(tmp_path_factory.mktemp("latents"))
    assert len({entry.bytes for entry in made.entries("*.arrow")}) == 1
    return made


@pytest.fixture
def latents(whole: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """A copy to damage, by its times written a while ago: what was written to just now is never stamped."""
    monkeypatch.setenv("EDT_CACHE_DIR", str(tmp_path / "cache"))
    assert whole.data.local is not None
    shutil.copytree(whole.data.local, tmp_path / "latents")
    for path in (tmp_path / "latents").iterdir():
        os.utime(path, (1_700_000_000, 1_700_000_000))
    return Artifact.open(str(tmp_path / "latents"))


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nothing is left to Ray Train."""

    def started(*arguments: object) -> None:
        raise AssertionError("workers were started")

    monkeypatch.setattr(train, "_fit", started)


def opened(latents: Artifact, **fields: Any) -> Any:
    return open_latents(TrainConfig.model_validate({**CONFIG.model_dump(), **fields}), latents, Silent())


def run_verb(latents: Artifact, folder: Path, **fields: Any) -> Artifact:
    config = TrainConfig.model_validate({**CONFIG.model_dump(), **fields})
    identity = train.STAGE.fingerprint(config, {"latents": latents.fingerprint})
    out = ArtifactWriter(Folder.at(folder), "checkpoint", identity)
    return train.STAGE.execute(config, {"latents": latents}, out, Silent())


def rewritten(path: Path, change: Callable[[bytearray], object]) -> None:
    """Other bytes of the same number in the same file; the time of modification is put back as well."""
    times, data = path.stat(), bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def flip(path: Path, place: int) -> None:
    def change(data: bytearray) -> None:
        data[place] ^= 1

    rewritten(path, change)


def swap_names(folder: Path) -> None:
    (folder / NAMES[0]).rename(folder / "aside")
    (folder / NAMES[2]).rename(folder / NAMES[0])
    (folder / "aside").rename(folder / NAMES[2])


def swap_contents(folder: Path) -> None:
    one, two = (bytearray((folder / name).read_bytes()) for name in (NAMES[0], NAMES[2]))
    rewritten(folder / NAMES[0], lambda data: data.__setitem__(slice(None), two))
    rewritten(folder / NAMES[2], lambda data: data.__setitem__(slice(None), one))


def lengthen(folder: Path) -> None:
    with (folder / NAMES[1]).open("ab") as file:
        file.write(b"\0")


DIFFERENT = r"has \d+ bytes as in its manifest, but another sha256"
BOTH_DIFFER = rf"2 problems: {NAMES[0]} {DIFFERENT}; {NAMES[2]} {DIFFERENT}"
DIFFERS = rf"1 problem: {NAMES[1]} {DIFFERENT}"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / NAMES[1]).unlink(), rf"1 problem: {NAMES[1]} is missing"),
    "extra": (
        lambda folder: shutil.copyfile(folder / NAMES[1], folder / "latents-00003.arrow"),
        r"1 problem: latents-00003\.arrow is not in the manifest",
    ),
    "renamed": (
        lambda folder: (folder / NAMES[1]).rename(folder / "latents-00009.arrow"),
        rf"2 problems: {NAMES[1]} is missing; latents-00009\.arrow is not in the manifest",
    ),
    "swapped": (swap_names, BOTH_DIFFER),
    "contents swapped": (swap_contents, BOTH_DIFFER),
    "duplicated": (lambda folder: shutil.copyfile(folder / NAMES[0], folder / NAMES[1]), DIFFERS),
    "longer": (lengthen, rf"1 problem: {NAMES[1]} has \d+ bytes, its manifest says \d+"),
    "shorter": (
        lambda folder: os.truncate(folder / NAMES[1], 10_000),
        rf"1 problem: {NAMES[1]} has 10000 bytes, its manifest says \d+",
    ),
    "empty": (
        lambda folder: os.truncate(folder / NAMES[1], 0),
        rf"1 problem: {NAMES[1]} has 0 bytes, its manifest says \d+",
    ),
    "a bit of a posterior": (lambda folder: flip(folder / NAMES[1], 50_000), DIFFERS),
    "a bit of the footer": (lambda folder: flip(folder / NAMES[1], -100), DIFFERS),
    "the last bit": (lambda folder: flip(folder / NAMES[1], -1), DIFFERS),
}


@pytest.mark.parametrize("stamped", [False, True], ids=["first", "stamped"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_shards_are_refused_before_there_is_a_dataset(latents: Artifact, kind: str, stamped: bool) -> None:
    """On a node that never saw them, and on one where a training of the same artifact has been before."""
    if stamped:
        assert len(opened(latents)) == SHARDS * ROWS
    damage, message = DAMAGE[kind]
    assert latents.data.local is not None
    damage(latents.data.local)
    with pytest.raises(
        ManifestError, match=rf"^{latents.folder.uri} is damaged, {message}.*; (rerun its step|run its step|remove )"
    ):
        opened(latents)


def test_shards_of_one_manifest_that_are_one_shard_twice_are_refused(tmp_path: Path, whole: Artifact) -> None:
    """A manifest that was written over the damage: the shards' own metadata still tells."""
    assert whole.data.local is not None
    out = ArtifactWriter(Folder.at(tmp_path / "twice"), "latents", "f" * 64)
    for name, source in (("latents-00000.arrow", NAMES[1]), ("latents-00001.arrow", NAMES[1])):
        out.write_bytes(name, (whole.data.local / source).read_bytes(), ROWS)
    with pytest.raises(UserError, match="a repeated shard"):
        opened(out.commit({}, {}, COUNTS))
    out = ArtifactWriter(Folder.at(tmp_path / "swapped"), "latents", "f" * 64)
    for name, source in (("latents-00000.arrow", NAMES[1]), ("latents-00001.arrow", NAMES[0])):
        out.write_bytes(name, (whole.data.local / source).read_bytes(), ROWS)
    with pytest.raises(UserError, match="the shards are out of order"):
        opened(out.commit({}, {}, COUNTS))


def test_digests_are_compared_once_on_a_node(latents: Artifact, digested: list[str]) -> None:
    assert isinstance(opened(latents), LatentDataset)
    assert sorted(digested) == NAMES
    opened(latents)
    opened(Artifact.open(latents.folder))  # another training, with an Artifact of its own
    assert len(digested) == SHARDS


@pytest.mark.extern
def test_another_process_on_the_node_digests_nothing_again(latents: Artifact) -> None:
    """Each rank of a training is a process; one EDT_CACHE_DIR is what makes them one node."""
    opened(latents)
    code = """
import os, sys
from edt_core.store.artifact import Artifact
from edt_core.config import TrainConfig
from edt_core.progress import Silent
from edt_core.store.folder import Folder
from jobs.stages.training.latents import open_latents
names, digest = [], Folder.digest
Folder.digest = lambda self, name: names.append(name) or digest(self, name)
for node in (os.environ["EDT_CACHE_DIR"], os.environ["EDT_CACHE_DIR"] + "-of-another-node"):
    os.environ["EDT_CACHE_DIR"] = node
    print(len(open_latents(TrainConfig(), Artifact.open(sys.argv[1]), Silent())), len(names))
"""
    command = [sys.executable, "-c", code, latents.folder.uri]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == [f"{SHARDS * ROWS} 0", f"{SHARDS * ROWS} {SHARDS}", ""]


def test_a_shard_that_was_touched_is_digested_again_and_alone(latents: Artifact, digested: list[str]) -> None:
    opened(latents)
    path = latents.path(NAMES[1])
    flip(path, 50_000)
    for _ in range(2):  # what was wrong once is not remembered as seen
        digested.clear()
        with pytest.raises(ManifestError, match=DIFFERS):
            opened(latents)
        assert digested == [NAMES[1]]
    flip(path, 50_000)
    digested.clear()
    opened(latents)
    opened(latents)
    assert digested == [NAMES[1]]


def test_digests_are_compared_once_an_artifact(latents: Artifact, digested: list[str], tmp_path: Path) -> None:
    """The same bytes in another place are other files, and are read."""
    opened(latents)
    shutil.copytree(tmp_path / "latents", tmp_path / "copy")
    digested.clear()
    opened(Artifact.open(str(tmp_path / "copy")))
    assert sorted(digested) == NAMES


def test_the_streaming_reader_wants_its_tars(tmp_path: Path, no_worker: None) -> None:
    latents = write_latents(tmp_path / "latents", tars=False)
    message = (
        rf"^train\.reader is webdataset, but {latents.folder.uri} has no latents-\*\.tar: encode again with "
        r"encode\.write_webdataset=true, or train with train\.reader=stream$"
    )
    with pytest.raises(UserError, match=message):
        run_verb(latents, tmp_path / "out", reader="webdataset")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=message):
        opened(latents, reader="webdataset")


def test_each_worker_wants_a_tar_of_its_own(latents: Artifact, tmp_path: Path, no_worker: None) -> None:
    with pytest.raises(UserError, match=r"^3 latent tar shards for 4 workers: .*use fewer workers, or preprocess with"):
        run_verb(latents, tmp_path / "out", reader="webdataset", num_workers=4)
    assert not (tmp_path / "out").exists()
    with pytest.raises(AssertionError, match="workers were started"):  # what is enough goes on
        run_verb(latents, tmp_path / "out", reader="webdataset", num_workers=2)
    with pytest.raises(AssertionError, match="workers were started"):  # the other reader shares rows, not shards
        run_verb(latents, tmp_path / "out", reader="arrow", num_workers=4)


@pytest.mark.parametrize("text", [None, "[]", '{"16": "flash"}', '{"training": [{"tokens": 16}]}'])
def test_a_bad_attention_table_is_refused_where_the_command_runs(
    text: str | None, latents: Artifact, tmp_path: Path, no_worker: None
) -> None:
    """Also by a dry run; a valid one reaches the workers."""
    table = tmp_path / "table.json"
    if text is not None:
        table.write_text(text)
    message = rf"^the attention table {table} \(train\.attention_table\) "
    with pytest.raises(UserError, match=message):
        run_verb(latents, tmp_path / "out", attention_table=str(table))
    assert not (tmp_path / "out").exists()
    config = CONFIG.model_copy(update={"attention_table": str(table)})
    with pytest.raises(UserError, match=message):
        train.plan(config, {"latents": latents})
    table.write_text('{"16": "sdpa"}')
    assert "steps" in train.plan(config, {"latents": latents})
    with pytest.raises(AssertionError, match="workers were started"):
        run_verb(latents, tmp_path / "out", attention_table=str(table))


def test_the_streaming_reader_digests_as_it_reads_and_not_before(latents: Artifact, digested: list[str]) -> None:
    stream = opened(latents, reader="webdataset")
    assert isinstance(stream, TarStream)
    assert [(shard.name, shard.rows) for shard in stream.shards] == [(f"latents-{k:05d}.tar", ROWS) for k in range(3)]
    assert [shard.sha256 for shard in stream.shards] == [entry.sha256 for entry in latents.entries("*.tar")]
    assert digested == []


@pytest.mark.parametrize("kind", ["missing", "longer", "extra"])
def test_the_streaming_reader_looks_at_names_and_sizes_before_it_starts(latents: Artifact, kind: str) -> None:
    """One listing tells, nothing is read for it; a training must not find out after hours of steps."""
    assert latents.data.local is not None
    tar = latents.data.local / "latents-00001.tar"
    if kind == "missing":
        tar.unlink()
    elif kind == "longer":
        tar.write_bytes(tar.read_bytes() + bytes(512))
    else:
        shutil.copyfile(tar, tar.with_name("latents-00003.tar"))
    with pytest.raises(UserError, match=r"latents-0000[13]\.tar"):
        opened(latents, reader="webdataset")

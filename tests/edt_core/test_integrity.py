"""Damage, over Arrow and tar shards: what is flipped, cut, swapped or lost never passes. The figures are asserted."""

import io
import os
import random
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from edt_core.errors import UserError
from edt_core.store.artifact import Artifact, ArtifactWriter, ManifestError
from edt_core.store.folder import Folder
from edt_core.store.layout import MANIFEST_NAME
from jobs.commands.verify import verify
from tests.support.small import edt

TRIALS = 200
ROWS, VALUES = 64, 2 * 4 * 8 * 8


def arrow_shard(seed: int) -> tuple[bytes, list[int]]:
    """A latent shard in the Arrow IPC file format, and where its messages end."""
    rng = np.random.default_rng(seed)
    schema = pa.schema([("key", pa.string()), ("label", pa.int64()), ("posterior", pa.list_(pa.float32(), VALUES))])
    sink, ends = io.BytesIO(), []
    with pa.ipc.new_file(sink, schema) as writer:
        for _ in range(2):
            posterior = pa.FixedSizeListArray.from_arrays(rng.normal(size=ROWS * VALUES).astype(np.float32), VALUES)
            keys, labels = [f"{k:06d}" for k in range(ROWS)], rng.integers(0, 10, ROWS)
            writer.write_batch(pa.record_batch([keys, labels, posterior], schema=schema))
            ends.append(sink.tell())
    return sink.getvalue(), ends


def tar_shard(seed: int) -> bytes:
    """An image shard: samples of an image, its class and its JSON."""
    rng, sink = random.Random(seed), io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for k in range(48):
            for member, data in (("webp", rng.randbytes(3000)), ("cls", b"3"), ("json", b'{"label": 3}')):
                info = tarfile.TarInfo(f"{k:06d}.{member}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """Two Arrow and two tar shards, about 1 MB, pairs of the same size; by their times written a while ago."""
    monkeypatch.setenv("EDT_CACHE_DIR", str(tmp_path / "cache"))
    out = ArtifactWriter(Folder.at(tmp_path / "store"), "latents", "0" * 64, "a1")
    for k in range(2):
        out.write_bytes(f"latents-{k:05d}.arrow", arrow_shard(k)[0], rows=2 * ROWS)
        out.write_bytes(f"images-{k:05d}.tar", tar_shard(k), rows=48)
    made = out.commit({}, {}, {})
    for path in made.paths():
        os.utime(path, (1_700_000_000, 1_700_000_000))
    assert 700_000 < sum(entry.bytes for entry in made.entries()) < 2_000_000
    return made


def verified_once(artifact: Artifact) -> bool:
    try:
        artifact.verify_once()
    except ManifestError:
        return False
    return True


def opened(artifact: Artifact) -> bool:
    try:
        Artifact.open(artifact.folder)
    except ManifestError:
        return False
    return True


def verified_deep(artifact: Artifact) -> bool:
    try:
        verify(artifact.folder.uri, deep=True)
    except UserError:
        return False
    return True


def test_one_flipped_bit_anywhere_is_found_200_of_200(artifact: Artifact) -> None:
    rng, found_deep, found_once = random.Random(0), 0, 0
    assert verified_once(artifact)
    assert verified_deep(artifact)
    paths = artifact.paths()
    for trial in range(TRIALS):
        path = paths[trial % len(paths)]
        place, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)

        def flip(path: Path = path, place: int = place, bit: int = bit) -> None:
            with path.open("r+b") as file:
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ bit]))

        flip()
        found_once += not verified_once(artifact)
        found_deep += not verified_deep(artifact)
        flip()
    assert (found_once, found_deep) == (TRIALS, TRIALS)
    assert verified_once(artifact)


def test_a_file_cut_anywhere_is_found_200_of_200_at_opening(artifact: Artifact) -> None:
    """At random places, at each end of an Arrow message and about it, and at and about the 512-byte blocks of tar."""
    rng, found, tried = random.Random(0), 0, 0
    arrow, tar = artifact.path("latents-00000.arrow"), artifact.path("images-00000.tar")
    size = tar.stat().st_size
    ends = [0, 8, *arrow_shard(0)[1], arrow.stat().st_size - 1, arrow.stat().st_size - 6]
    cuts = [(arrow, end + shift) for end in ends for shift in (-1, 0, 1) if 0 <= end + shift < arrow.stat().st_size]
    blocks = [0, 1, 2, 7, 8, 9, size // 512 - 20, size // 512 - 2, size // 512 - 1, *range(40, 60)]
    cuts += [(tar, 512 * block + shift) for block in blocks for shift in (-1, 0, 1) if 512 * block + shift >= 0]
    while len(cuts) < TRIALS:
        path = rng.choice((arrow, tar))
        cuts.append((path, rng.randrange(path.stat().st_size)))
    for path, cut in cuts[:TRIALS]:
        whole = path.read_bytes()
        os.truncate(path, cut)
        tried, found = tried + 1, found + (not opened(artifact))
        path.write_bytes(whole)
    assert (found, tried) == (TRIALS, TRIALS)
    assert opened(artifact)


def swap(folder: Path) -> None:
    (folder / "latents-00000.arrow").rename(folder / "aside")
    (folder / "latents-00001.arrow").rename(folder / "latents-00000.arrow")
    (folder / "aside").rename(folder / "latents-00001.arrow")


def swap_keeping_names(folder: Path) -> None:
    """The contents change places, with sizes, inodes and times of modification as they were."""
    one, two = folder / "images-00000.tar", folder / "images-00001.tar"
    contents, times = (one.read_bytes(), two.read_bytes()), one.stat()
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    for path in (one, two):
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def duplicate(folder: Path) -> None:
    shutil.copyfile(folder / "latents-00000.arrow", folder / "latents-00001.arrow")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda folder: (folder / "images-00001.tar").unlink(),
    "extra": lambda folder: (folder / "latents-00002.arrow").write_bytes(arrow_shard(2)[0]),
    "extra in a folder": lambda folder: shutil.copytree(folder, folder / "copy"),
    "swapped": swap,
    "swapped contents": swap_keeping_names,
    "duplicated": duplicate,
    "longer": lambda folder: (folder / "images-00001.tar").open("ab").write(b"\0"),
    "shorter": lambda folder: os.truncate(folder / "images-00001.tar", 512),
    "a link to nothing": lambda folder: (
        (folder / "images-00001.tar").unlink(),
        (folder / "images-00001.tar").symlink_to("nothing"),
    ),
}


@pytest.mark.parametrize("stamped", [False, True], ids=["first", "stamped"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_shards_that_are_not_the_manifests_are_refused(artifact: Artifact, kind: str, stamped: bool) -> None:
    if stamped:
        artifact.verify_once()
    data = artifact.data.local
    assert data is not None
    DAMAGE[kind](data)
    with pytest.raises(ManifestError, match=r"is damaged, \d problems?: .*(latents|images)-0000.*; (rerun|remove) "):
        artifact.verify_once()
    assert not verified_deep(artifact)


def test_untouched_files_are_digested_once_a_node(artifact: Artifact, digested: list[str]) -> None:
    artifact.verify_once("*.arrow")
    assert sorted(digested) == ["latents-00000.arrow", "latents-00001.arrow"]
    artifact.verify_once("*.arrow")
    assert len(digested) == 2
    artifact.verify_once()
    assert sorted(digested)[:2] == ["images-00000.tar", "images-00001.tar"]
    artifact.verify_once()
    assert len(digested) == 4
    artifact.path("images-00001.tar").touch()
    artifact.verify_once()
    assert digested[4:] == ["images-00001.tar"]


def test_ranks_that_verify_at_once_digest_once(artifact: Artifact, digested: list[str]) -> None:
    together = threading.Barrier(4)

    def rank() -> None:
        together.wait()
        artifact.verify_once("*.arrow")

    ranks = [threading.Thread(target=rank) for _ in range(4)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert sorted(digested) == ["latents-00000.arrow", "latents-00001.arrow"]


def test_a_file_written_to_a_moment_ago_is_not_stamped(artifact: Artifact, digested: list[str]) -> None:
    """It could be written to again within the tick of the file system's clock."""
    artifact.path("images-00001.tar").touch()
    artifact.verify_once("*.tar")
    artifact.verify_once("*.tar")
    assert digested.count("images-00001.tar") == 2
    assert digested.count("images-00000.tar") == 1


def test_one_good_and_one_damaged_file(artifact: Artifact, digested: list[str]) -> None:
    path = artifact.path("images-00001.tar")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    for _ in range(2):
        with pytest.raises(
            ManifestError, match=r"1 problem: images-00001\.tar has \d+ bytes as in its manifest, but another sha"
        ):
            artifact.verify_once("*.tar")
    assert digested.count("images-00000.tar") == 1
    path.write_bytes(whole)
    artifact.verify_once("*.tar")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"images-00000.tar": 1}'])
def test_a_stamp_that_is_damaged_is_no_stamp(
    artifact: Artifact, digested: list[str], text: bytes, tmp_path: Path
) -> None:
    artifact.verify_once()
    (stamp,) = (tmp_path / "cache" / "verified").glob("*.json")
    stamp.write_bytes(text)
    artifact.verify_once()
    assert len(digested) == 8


def test_without_a_place_for_stamps_files_are_still_verified(
    artifact: Artifact, digested: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDT_CACHE_DIR", "/dev/null/cache")
    artifact.verify_once("*.tar")
    artifact.verify_once("*.tar")
    assert len(digested) == 4


def test_verify_as_a_command(artifact: Artifact) -> None:
    assert "4 files" in edt("verify", artifact.folder.uri, "--deep").stdout
    data = artifact.data.local
    assert data is not None
    for k in range(12):
        (data / f"extra-{k:02d}").write_bytes(b"")
    done = edt("verify", artifact.folder.uri)
    assert done.returncode == 2
    shown = done.stderr
    assert shown.startswith("error: ")
    assert "12 problems in 4 files" in shown
    assert "and 2 more" in shown
    assert shown.count("is not in the manifest") == 10


@pytest.mark.extern
def test_verify_imports_no_ray(artifact: Artifact) -> None:
    import sys

    code = "import sys; from pipelines.cli import app; app(sys.argv[1:], standalone_mode=False); "
    code += "assert not {'ray', 'torch'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code, "verify", artifact.folder.uri, "--deep"], check=True, capture_output=True
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here: that takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.faults
def test_a_full_disk_loses_nothing_and_publishes_nothing(small_disk: Path) -> None:
    out = ArtifactWriter(Folder.at(small_disk / "store"), "images", "0" * 64, "a1")
    out.write_bytes("one.bin", bytes(1000))
    (small_disk / "filler").write_bytes(bytes(600_000))

    def halves(path: Path) -> int:
        with path.open("wb") as file:
            for _ in range(2):
                file.write(bytes(300_000))
                file.flush()
        return 2

    with pytest.raises(UserError, match=f"cannot write to {small_disk}.*no space is left on the device"):
        out.write("two.bin", halves)
    assert sorted(p.name for p in (small_disk / "store").rglob("*") if p.is_file()) == ["one.bin", "one.bin.json"]
    assert not list((small_disk / "store").rglob(".staging-*"))
    assert not (small_disk / "store" / MANIFEST_NAME).exists()
    (small_disk / "filler").unlink()
    out.write("two.bin", halves)
    assert [entry.path for entry in out.commit({}, {}, {}).entries()] == ["one.bin", "two.bin"]
    assert verify(out.folder.uri, deep=True)


def test_a_library_that_words_a_full_disk_its_own_way(small_disk: Path) -> None:
    from safetensors.numpy import save_file

    out = ArtifactWriter(Folder.at(small_disk / "store"), "images", "0" * 64, "a1")
    with pytest.raises(UserError, match="no space is left on the device"):
        out.write("x.safetensors", lambda path: save_file({"x": np.zeros(1_000_000, np.float32)}, path))


def test_a_full_disk_under_the_cache_keeps_nothing(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ArtifactWriter(Folder.at(f"memory://{tmp_path.name}/store"), "images", "0" * 64, "a1")
    out.write_bytes("x.bin", bytes(800_000))
    artifact = out.commit({}, {}, {})
    monkeypatch.setenv("EDT_CACHE_DIR", str(small_disk / "cache"))
    monkeypatch.setenv("EDT_CACHE_BYTES", "10MB")
    (small_disk / "filler").write_bytes(bytes(600_000))
    with pytest.raises(UserError, match=r"no space is left on the device"):
        artifact.paths()
    assert not [path for path in (small_disk / "cache" / "objects").rglob("*") if path.is_file()]
    (small_disk / "filler").unlink()
    assert artifact.path("x.bin").stat().st_size == 800_000

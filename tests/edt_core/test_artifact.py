"""Artifacts: a manifest or nothing."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edt_core.errors import UserError
from edt_core.store.artifact import Artifact, ArtifactWriter, Manifest, ManifestError, check_name, fingerprint
from edt_core.store.folder import Folder
from edt_core.store.layout import MANIFEST_NAME
from edt_core.store.store import Store


def writer(folder: Path, attempt: str = "a1", previous: tuple[str, ...] = ()) -> ArtifactWriter:
    return ArtifactWriter(Folder.at(folder), "images", "0" * 64, attempt, previous)


def committed(folder: Path) -> Artifact:
    out = writer(folder)
    out.write_bytes("one.bin", b"1" * 100, rows=3)
    out.write_bytes("sub/two.bin", b"2" * 50)
    return out.commit({"size": 32}, {"source": "s"}, {"images": 3})


def test_what_is_committed_is_found_again(tmp_path: Path) -> None:
    committed(tmp_path)
    artifact = Artifact.open(str(tmp_path))
    assert [(f.path, f.bytes, f.rows) for f in artifact.entries()] == [
        ("one.bin", 100, 3),
        ("sub/two.bin", 50, None),
    ]
    assert artifact.path("sub/two.bin").read_bytes() == b"2" * 50
    assert artifact.directory("sub") == tmp_path / "a1" / "sub"
    assert artifact.problems(deep=True) == []


def test_without_a_manifest_there_is_nothing(tmp_path: Path) -> None:
    writer(tmp_path).write_bytes("one.bin", b"1")
    with pytest.raises(ManifestError, match="never finished"):
        Artifact.open(str(tmp_path))


def test_a_manifest_cut_anywhere_is_never_trusted(tmp_path: Path) -> None:
    committed(tmp_path)
    text = (tmp_path / MANIFEST_NAME).read_bytes()
    for cut in range(0, len(text) - 1, max(1, len(text) // 60)):
        (tmp_path / MANIFEST_NAME).write_bytes(text[:cut])
        with pytest.raises(ManifestError):
            Artifact.open(str(tmp_path))


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values["files"][0].update(sha256="0" * 64),
        lambda values: values["counts"].update(images=4),
        lambda values: values["config"].update(size=64),
        lambda values: values["inputs"].clear(),
        lambda values: values.update(attempt="a2"),
        lambda values: values.update(created_at="1999-01-01T00:00:00Z"),
        lambda values: values.update(note="added"),
        lambda values: values.pop("seal"),
        lambda values: values.update(seal="0" * 64),
    ],
)
def test_an_edited_manifest_is_never_trusted(edit: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    committed(tmp_path)
    values = json.loads((tmp_path / MANIFEST_NAME).read_text())
    edit(values)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(values))
    with pytest.raises(ManifestError, match=r"match its seal|not a valid manifest"):
        Artifact.open(str(tmp_path))


def test_a_flipped_bit_anywhere_in_a_manifest_is_refused(tmp_path: Path) -> None:
    """Every byte, one bit of it; what is not refused differs in nothing but white space or the case of an escape."""
    manifest = committed(tmp_path).manifest
    text = manifest.to_json().encode()
    passed = 0
    for place in range(len(text)):
        flipped = bytearray(text)
        flipped[place] ^= 1 << (place % 8)
        try:
            assert Manifest.from_json(bytes(flipped), "flipped") == manifest
            passed += 1
        except ManifestError:
            pass
    assert passed < len(text) / 20


def test_a_manifest_that_holds_a_key_twice_is_refused(tmp_path: Path) -> None:
    text = committed(tmp_path).manifest.to_json()
    with pytest.raises(ManifestError, match="contains a key twice"):
        Manifest.from_json(text.replace('"kind"', '"kind": "latents", "kind"'), "edited")


def test_a_sealed_manifest_may_hold_any_json(tmp_path: Path) -> None:
    out = writer(tmp_path)
    out.write_bytes("x", b"1")
    config: dict[str, Any] = {
        "eta": 1e-5,
        "name": "Zo\u00eb",
        "shape": (4, 8, 8),
        "by_class": {10: 1, 9: 2},
        "none": None,
    }
    artifact = out.commit(config, {}, {})
    assert Artifact.open(str(tmp_path)).manifest.config["by_class"] == {"10": 1, "9": 2}
    assert Manifest.from_json(artifact.manifest.to_json(), "again") == artifact.manifest


def test_a_manifest_of_another_schema_version_names_both(tmp_path: Path) -> None:
    text = committed(tmp_path).manifest.to_json().replace('"schema_version": 2', '"schema_version": 1')
    with pytest.raises(ManifestError, match="schema version 1, but this version reads 2"):
        Manifest.from_json(text, "old")


def test_files_that_the_manifest_does_not_list_are_refused(tmp_path: Path) -> None:
    committed(tmp_path)
    for name in (".DS_Store", ".journal/x.json", "sub/.staging-1/y"):
        (tmp_path / "a1" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "a1" / name).write_bytes(b"")
    assert Artifact.open(str(tmp_path)).problems() == []
    (tmp_path / "a1" / "sub" / "three.bin").write_bytes(b"x")
    with pytest.raises(ManifestError, match=r"1 problem: sub/three\.bin is not in the manifest"):
        Artifact.open(str(tmp_path))


def test_in_an_artifact_of_one_attempt_the_manifest_is_not_an_extra_file(tmp_path: Path) -> None:
    out = writer(tmp_path, "")
    out.write_bytes("x", b"1")
    out.commit({}, {}, {})
    assert Artifact.open(str(tmp_path)).problems(deep=True) == []
    (tmp_path / "y").write_bytes(b"")
    with pytest.raises(ManifestError, match="y is not in the manifest"):
        Artifact.open(str(tmp_path))


def test_many_problems_are_ten_and_a_number(tmp_path: Path) -> None:
    committed(tmp_path)
    for k in range(25):
        (tmp_path / "a1" / f"extra-{k:02d}").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"25 problems: .*extra-09 is not in the manifest; and 15 more; rerun"):
        Artifact.open(str(tmp_path))


def test_missing_resized_and_changed_files_are_found(tmp_path: Path) -> None:
    artifact = committed(tmp_path)
    path = artifact.path("one.bin")
    path.write_bytes(b"1" * 99 + b"x")
    assert artifact.problems() == []
    assert artifact.problems(deep=True) == ["one.bin has 100 bytes as in its manifest, but another sha256"]
    path.write_bytes(b"1")
    with pytest.raises(ManifestError, match="1 bytes, its manifest says 100"):
        Artifact.open(str(tmp_path))
    path.unlink()
    with pytest.raises(ManifestError, match=r"one\.bin is missing"):
        Artifact.open(str(tmp_path))


def test_the_first_of_two_commits_wins(tmp_path: Path) -> None:
    first, second = writer(tmp_path, "a1"), writer(tmp_path, "a2")
    first.write_bytes("x", b"first")
    second.write_bytes("x", b"second")
    first.commit({}, {}, {})
    assert second.commit({}, {}, {}).path("x").read_bytes() == b"first"


def test_a_new_attempt_replaces_a_damaged_artifact(tmp_path: Path) -> None:
    committed(tmp_path).path("one.bin").unlink()
    repaired = writer(tmp_path, "a2")
    repaired.write_bytes("one.bin", b"again")
    assert repaired.commit({}, {}, {}).path("one.bin").read_bytes() == b"again"


def test_an_attempt_takes_over_finished_files_and_no_others(tmp_path: Path) -> None:
    dead = writer(tmp_path, "a1")
    dead.write_bytes("done.bin", b"done", rows=2)
    dead.write_bytes("flipped.bin", b"good")
    (tmp_path / "a1" / "flipped.bin").write_bytes(b"goof")
    (tmp_path / "a1" / "half.bin").write_bytes(b"no journal entry")
    new = writer(tmp_path, "a2", previous=("a1",))
    entry = new.recover("done.bin")
    assert entry is not None
    assert entry.rows == 2
    assert new.recover("flipped.bin") is None
    assert new.recover("half.bin") is None
    assert [f.path for f in new.commit({}, {}, {}).entries()] == ["done.bin"]


def test_a_commit_refuses_files_that_are_gone(tmp_path: Path) -> None:
    out = writer(tmp_path)
    out.write_bytes("x", b"1")
    (tmp_path / "a1" / "x").unlink()
    with pytest.raises(ManifestError, match="x is missing"):
        out.commit({}, {}, {})
    assert not (tmp_path / MANIFEST_NAME).exists()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a\\b", "", "."])
def test_names_stay_inside(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leads outside its artifact"):
        check_name(name)
    with pytest.raises(UserError, match="leads outside its artifact"):
        writer(tmp_path).write_bytes(name, b"")


def test_equal_content_gives_an_equal_digest(tmp_path: Path) -> None:
    assert committed(tmp_path / "a").manifest.digest == committed(tmp_path / "b").manifest.digest


def test_the_fingerprint_hangs_on_everything_it_is_made_of() -> None:
    base = fingerprint("images", 1, {"size": 32}, {"source": "a"})
    assert base == fingerprint("images", 1, {"size": 32}, {"source": "a"})
    others = [
        fingerprint("latents", 1, {"size": 32}, {"source": "a"}),
        fingerprint("images", 2, {"size": 32}, {"source": "a"}),
        fingerprint("images", 1, {"size": 64}, {"source": "a"}),
        fingerprint("images", 1, {"size": 32}, {"source": "b"}),
    ]
    assert len({base, *others}) == 5


def test_a_remote_store_holds_the_same_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol over fsspec, on its in-memory file system: what object stores go through."""
    monkeypatch.setenv("EDT_CACHE_DIR", str(tmp_path))
    out = ArtifactWriter(Folder.at(f"memory://{tmp_path.name}/images/00"), "images", "0" * 64, "a1")
    out.write_bytes("sub/one.bin", b"1" * 10, rows=1)
    out.commit({}, {}, {"images": 1})
    artifact = Artifact.open(out.folder)
    assert artifact.path("sub/one.bin").read_bytes() == b"1" * 10
    assert artifact.problems(deep=True) == []
    assert not out.folder.write_bytes(MANIFEST_NAME, b"{}", exclusive=True)
    out.data.remove("sub/one.bin")
    with pytest.raises(ManifestError, match="missing"):
        Artifact.open(out.folder)


@pytest.mark.parametrize("where", ["/proc/edt-store", "/dev/null/store"])
def test_a_store_that_cannot_be_written_is_one_clear_message(where: str) -> None:
    with pytest.raises(UserError, match=f"cannot write to {where}"):
        Folder.at(where).check_writable()


def test_a_process_that_waits_for_a_lock_reports_it_and_then_holds_it(tmp_path: Path) -> None:
    store, held, free = Store(Folder.at(tmp_path)), threading.Event(), threading.Event()
    calls: list[bool | str] = []

    def hold() -> None:
        with store.lock("images", "a"):
            held.set()
            free.wait(60)

    def busy() -> None:
        calls.append(free.is_set())
        free.set()

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(60)
    with store.lock("images", "b", busy):
        assert calls == []  # another artifact's lock is free
    with store.lock("images", "a", busy):
        assert calls[0] is False
    other.join(60)
    with store.lock("images", "a", lambda: calls.append("again")):
        assert "again" not in calls

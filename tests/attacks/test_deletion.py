"""What belongs to its user, or is needed by somebody, is not deleted: by `edt gc`, the cache, exports, pulls."""

import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from edt_core.data import digits
from edt_core.data.digits import write_digits
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.cache import Cache, local_copy
from edt_core.store.contents import stamped_name
from edt_core.store.folder import Folder
from edt_core.store.layout import MANIFEST_NAME
from edt_core.store.room import Room
from edt_core.store.store import Store
from edt_core.store.trash import DAY_S
from edt_core.training.store import CheckpointStore
from jobs.models.registry_files import pull
from pipelines.registry.cleaning import Request, collect, plan
from pipelines.schedule.record import Schedules
from pipelines.schedule.server import Server
from pipelines.tracking.catalog import Catalog
from tests.support.garbage import begun, chain, made, names, register, run_about, there
from tests.support.registry import Registry, write_empty_mlflow
from tests.support.small import edt, environment


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def catalog(store: Store) -> Catalog:
    write_empty_mlflow(root_of(store))
    return Catalog.open(store.root, "gc")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Catalog:
    """An MLflow that knows a run, and none of the store's."""
    write_empty_mlflow(tmp_path / "elsewhere")
    catalog = Catalog.open(Folder.at(tmp_path / "elsewhere"), "other")
    catalog.end_run(catalog.start_run("p", {"edt.workflow": "p"}), "FINISHED")
    return catalog


def root_of(store: Store) -> Path:
    assert store.root.local is not None
    return store.root.local


def at(store: Store, artifact: Artifact) -> Path:
    return root_of(store) / artifact.manifest.kind / artifact.fingerprint


def trashed(store: Store) -> list[Path]:
    """The artifacts in the trash."""
    return sorted((root_of(store) / ".trash").glob("*/*/*"))


def grow_old(store: Store) -> None:
    """Let a day go by for what is in the trash: its folders are named by the time."""
    for folder in sorted((root_of(store) / ".trash").iterdir()):
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(time.time() - DAY_S - 60))
        folder.rename(folder.with_name(f"{stamp}-{folder.name.partition('-')[2]}"))


def cleaned(store: Store, catalog: Catalog, **options: bool) -> set[str]:
    return {item.fingerprint for item in collect(store, catalog, Request(1, **options)).garbage}


# --- the MLflow that is asked


def test_an_mlflow_that_does_not_know_the_store_removes_nothing(
    store: Store, catalog: Catalog, elsewhere: Catalog
) -> None:
    champion, old = chain(store, catalog, 1), chain(store, catalog, 2)
    register(catalog, run_about(catalog, champion), champion)
    where = ["gc", "--store", str(root_of(store)), "--yes"]
    for wrong in (elsewhere.tracking_uri, f"sqlite:///{root_of(store).parent}/typo.db"):
        for more in ([], ["--dry-run"]):
            done = edt(*where, *more, env=environment(MLFLOW_TRACKING_URI=wrong))
            assert done.returncode == 2
            assert f"the MLflow at {wrong} knows none of the 10 runs" in done.stderr
            assert "mlflow.db" in done.stderr  # where the right one is
        assert there(store) == names(champion + old)
    done = edt(*where, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert {item["fingerprint"] for item in json.loads(done.stdout)["garbage"]} == names(old)
    assert there(store) == names(champion)
    done = edt(*where, "--force", env=environment(MLFLOW_TRACKING_URI=elsewhere.tracking_uri))
    assert done.returncode == 0, done.stderr
    assert there(store) == set()


def test_the_refusal_holds_no_password(store: Store, catalog: Catalog, elsewhere: Catalog) -> None:
    made(store, catalog, "images", 1)
    secret = Catalog(f"{elsewhere.tracking_uri}?password=canary-91", "")
    assert "canary" not in secret.place
    with pytest.raises(UserError, match="knows none of the 1 runs") as raised:
        plan(store, secret, Request(1))
    assert "canary" not in str(raised.value)


def test_what_another_mlflow_has_made_stays_with_all_it_was_made_from(
    store: Store, catalog: Catalog, elsewhere: Catalog
) -> None:
    """A champion of the other server, of latents that were made under this one; and an attempt that goes on there."""
    images = made(store, catalog, "images", 1)
    latents = made(store, catalog, "latents", 1, images=images)
    champion = made(store, elsewhere, "checkpoint", 1, latents=latents)
    by_hand = made(store, None, "images", 3)
    begun(store, elsewhere, "features", "a" * 64)
    old = made(store, catalog, "images", 2)
    planned = plan(store, catalog, Request(1))
    assert planned.left_alone.keys() == {
        f"checkpoint/{champion.fingerprint}",
        f"images/{by_hand.fingerprint}",
        f"features/{'a' * 64}",
    }
    why = planned.left_alone[f"checkpoint/{champion.fingerprint}"]
    assert f"the run {champion.manifest.mlflow_run_id} that the MLflow at {catalog.place} does not know" in why
    assert cleaned(store, catalog) == {old.fingerprint}
    assert there(store) == names([images, latents, champion, by_hand])
    assert cleaned(store, catalog, force=True) == {*names([images, latents, champion, by_hand]), "a" * 64}


def test_what_was_made_by_a_run_that_was_deleted_may_go(store: Store, catalog: Catalog) -> None:
    images = made(store, catalog, "images", 1)
    begun(store, catalog, "latents", "b" * 64)
    for run in catalog.client.search_runs([catalog.experiment_id]):
        catalog.client.delete_run(run.info.run_id)
    assert cleaned(store, catalog) == {images.fingerprint, "b" * 64}


def test_a_store_that_holds_nothing_and_an_mlflow_that_knows_nothing(store: Store, catalog: Catalog) -> None:
    assert plan(store, catalog, Request(1)).garbage == []
    assert edt("gc", "--store", str(root_of(store)), "--yes").stdout == "nothing to remove\n"


def test_of_a_needed_artifact_that_cannot_be_read_the_inputs_stay(store: Store, catalog: Catalog) -> None:
    """As a manifest of a newer version, or with a flipped bit: what it was made from is not known."""
    images = made(store, catalog, "images", 1)
    latents = made(store, catalog, "latents", 1, images=images)
    run_about(catalog, [latents])
    manifest = at(store, latents) / MANIFEST_NAME
    text = manifest.read_text()
    manifest.write_text(text.replace('"schema_version": 2', '"schema_version": 3'))
    assert manifest.read_text() != text
    with pytest.raises(UserError, match="1 artifacts that a registered model or a recent run needs"):
        cleaned(store, catalog)
    manifest.write_text(text)
    assert cleaned(store, catalog) == set()


def test_an_artifact_that_cannot_be_read_stays(store: Store, catalog: Catalog) -> None:
    images = made(store, catalog, "images", 1)
    (at(store, images) / MANIFEST_NAME).write_text("{")
    done = collect(store, catalog, Request(1))
    assert done.garbage == []
    assert "is not a valid manifest" in done.left_alone[f"images/{images.fingerprint}"]
    assert cleaned(store, catalog, force=True) == {images.fingerprint}


# --- what is not an artifact


def in_the_store(store: Store, garbage: Artifact, outside: Path) -> dict[str, Path]:
    """What a user may have put into a store, by its path there -> the file that must not change."""
    root, folder = root_of(store), at(store, garbage)
    (outside / "linked").mkdir(parents=True)
    (outside / "linked" / "data.bin").write_bytes(b"outside")
    shutil.copytree(folder, outside / ("c" * 64))  # an artifact, whole, elsewhere
    mine = {"images/mine": root / "images" / "mine" / "a.jpg", "images/notes.txt": root / "images" / "notes.txt"}
    mine["images/odd\n\x1b[31m name"] = root / "images" / "odd\n\x1b[31m name" / "a.jpg"
    mine[f"images/{'A' * 64}"] = root / "images" / ("A" * 64) / "a.jpg"
    mine[f"images/{'d' * 64}"] = root / "images" / ("d" * 64)  # a plain file with the name of an artifact
    for path in mine.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    links = {f"images/{'c' * 64}": outside / ("c" * 64), "images/link": outside / "linked"}
    links["latents"] = outside / "linked"
    for name, target in links.items():
        (root / name).symlink_to(target)
    return mine | {name: root / name for name in links}


def test_what_a_user_has_put_into_the_store_stays_and_is_named(store: Store, catalog: Catalog, tmp_path: Path) -> None:
    garbage = made(store, catalog, "images", 1)
    mine = in_the_store(store, garbage, tmp_path / "outside")
    outside = snapshot(tmp_path / "outside")
    where = ["gc", "--store", str(root_of(store))]
    listed = json.loads(edt(*where, "--dry-run", "--json").stdout)
    assert {item["path"] for item in listed["left_alone"]} == mine.keys()
    table = edt(*where, "--yes")
    assert table.returncode == 0, table.stderr
    assert all(name in table.stdout for name in ("left alone:", "images/mine: ", "latents: a link", r"odd\n\x1b[31m"))
    assert "\x1b" not in table.stdout
    assert not at(store, garbage).exists()
    assert all(os.path.lexists(path) for path in mine.values())
    assert snapshot(tmp_path / "outside") == outside
    assert all(path.read_bytes() == b"mine" for path in mine.values() if path.is_file())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_folder(folder: Path, artifact: Artifact) -> dict[str, Callable[[], object]]:
    """What a user may have done to the folder of an artifact, by what is told of it."""
    attempt = folder / artifact.manifest.attempt
    outside = folder.parents[1] / "outside"

    def link(path: Path) -> None:
        outside.mkdir(exist_ok=True)
        (outside / "file").write_bytes(b"outside")
        path.symlink_to(outside)

    return {
        "notes.txt is not an attempt": lambda: (folder / "notes.txt").write_bytes(b"mine"),
        "mine is not an attempt": lambda: (folder / "mine").mkdir(),
        ".mine is not an attempt": lambda: (folder / ".mine").write_bytes(b"mine"),
        f"{artifact.manifest.attempt}/mine.bin is not in": lambda: (attempt / "mine.bin").write_bytes(b"mine"),
        f"{artifact.manifest.attempt}/sub/deep.bin is not in": lambda: deep(attempt / "sub" / "deep.bin"),
        f"{artifact.manifest.attempt}/link is not in": lambda: link(attempt / "link"),
        "20260101T000000-0123abcd is a link": lambda: link(folder / "20260101T000000-0123abcd"),
        "20260101T000000-0123abcd is a file": lambda: (folder / "20260101T000000-0123abcd").write_bytes(b"mine"),
    }


def deep(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"mine")


def test_an_artifact_with_files_of_its_user_stays(store: Store, catalog: Catalog) -> None:
    images = made(store, catalog, "images", 1)
    whole = root_of(store) / "whole"
    shutil.copytree(at(store, images), whole)
    for told, change in in_folder(at(store, images), images).items():
        change()
        before = snapshot(at(store, images))
        done = collect(store, catalog, Request(1, force=True))
        assert (done.garbage, before) == ([], snapshot(at(store, images))), told
        assert told in done.left_alone[f"images/{images.fingerprint}"]
        shutil.rmtree(at(store, images))
        shutil.copytree(whole, at(store, images))
    assert cleaned(store, catalog) == {images.fingerprint}


def test_of_a_needed_artifact_only_attempts_go(store: Store, catalog: Catalog, tmp_path: Path) -> None:
    images = made(store, catalog, "images", 1)
    run_about(catalog, [images])
    lost = store.writer("images", images.fingerprint)
    lost.write_bytes("half.bin", b"half")
    (at(store, images) / "mine").mkdir()
    (at(store, images) / "mine" / "a.jpg").write_bytes(b"mine")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.jpg").write_bytes(b"mine")
    (at(store, images) / stamped_name()).symlink_to(tmp_path / "outside")
    done = collect(store, catalog, Request(1))
    assert [item.attempt for item in done.garbage] == [lost.attempt]
    assert len(done.left_alone) == 2
    assert (at(store, images) / "mine" / "a.jpg").read_bytes() == b"mine"
    assert (tmp_path / "outside" / "a.jpg").read_bytes() == b"mine"
    assert Artifact.open(images.folder).problems(deep=True) == []


def test_a_copy_under_another_name_stays(store: Store, catalog: Catalog) -> None:
    images = made(store, catalog, "images", 1)
    copy = root_of(store) / "images" / ("e" * 64)
    shutil.copytree(at(store, images), copy)
    begun(store, catalog, "images", "e" * 64)  # by its name MLflow knows it
    done = collect(store, catalog, Request(1))
    assert {item.fingerprint for item in done.garbage} == {images.fingerprint}
    assert "it was moved or copied" in done.left_alone[f"images/{'e' * 64}"]
    assert (copy / images.manifest.attempt / "a.bin").exists()


# --- the question


@contextmanager
def terminal(answer: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Somebody at a terminal, who types this."""

    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", Typed(answer))
        yield


def test_it_asks_at_a_terminal_and_refuses_without_one(
    store: Store, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = made(store, catalog, "images", 1)
    where = ["gc", "--store", str(root_of(store))]
    done = edt(*where)
    assert (done.returncode, done.stdout) == (2, "")
    assert "use --yes" in done.stderr
    for answer in ("n\n", "\n", ""):
        with terminal(answer, monkeypatch):
            done = edt(*where)
        assert done.returncode == 1
        assert "Move to the trash 1 folder (" in done.stderr
        assert images.fingerprint[:12] in done.stdout  # what goes is listed before
        assert there(store) == {images.fingerprint}
    with terminal("", monkeypatch):
        assert edt(*where, "--dry-run").returncode == 0  # nobody is asked
    with terminal("y\n", monkeypatch):
        done = edt(*where)
    assert done.returncode == 0, done.stderr
    assert f"moved to {root_of(store)}/.trash/" in done.stdout
    assert there(store) == set()
    with terminal("", monkeypatch):
        assert edt(*where).returncode == 0  # nothing is left to ask about


# --- the trash


def test_it_goes_to_the_trash_and_comes_back_by_a_move(store: Store, catalog: Catalog) -> None:
    images, other = made(store, catalog, "images", 1), made(store, catalog, "images", 2)
    size = sum(path.lstat().st_size for path in at(store, images).rglob("*") if path.is_file())
    done = collect(store, catalog, Request(1))
    assert {item.fingerprint: item.bytes for item in done.garbage}[images.fingerprint] == size
    assert {path.name for path in trashed(store)} == names([images, other])
    assert all(path.is_relative_to(str(done.trash)) for path in trashed(store))
    # Nothing that reads a store sees the trash.
    assert (store.find("images", images.fingerprint), there(store)) == (None, set())
    assert edt("artifacts", "--store", str(root_of(store)), "--json").stdout == "[]\n"
    assert store.root.walk().keys() == {"mlflow.db"}
    again = collect(store, catalog, Request(1))
    assert (again.garbage, again.discarded, len(trashed(store))) == ([], [], 2)  # less than a day
    (path,) = (path for path in trashed(store) if path.name == images.fingerprint)
    path.rename(at(store, images))  # as docs/workflow.md has it
    assert Artifact.open(images.folder).problems(deep=True) == []
    assert store.find("images", images.fingerprint) is not None


def test_after_a_day_or_when_asked_the_trash_is_emptied(store: Store, catalog: Catalog) -> None:
    made(store, catalog, "images", 1)
    collect(store, catalog, Request(1))
    grow_old(store)
    listed = edt("gc", "--store", str(root_of(store)), "--dry-run").stdout
    assert "1 folder (" in listed
    assert "would be deleted from the trash" in listed
    assert len(trashed(store)) == 1
    second = made(store, catalog, "images", 2)
    assert len(collect(store, catalog, Request(1)).discarded) == 1
    assert [path.name for path in trashed(store)] == [second.fingerprint]
    third = made(store, catalog, "images", 3)
    done = collect(store, catalog, Request(1, empty_trash=True))
    assert len(done.discarded) == 1
    assert [path.name for path in trashed(store)] == [third.fingerprint]  # what goes now can be put back


def test_what_is_not_of_gc_stays_in_the_trash(store: Store, catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.jpg").write_bytes(b"mine")
    trash = root_of(store) / ".trash"
    (trash / "mine").mkdir(parents=True)
    (trash / "notes.txt").write_bytes(b"mine")
    (trash / "20200101T000000-0123abcd").symlink_to(tmp_path / "outside")
    (trash / "20209999T000000-0123abcd").mkdir()
    before = set(os.listdir(trash))
    done = collect(store, catalog, Request(1, empty_trash=True))
    assert (done.discarded, set(os.listdir(trash))) == ([], before)
    assert done.left_alone.keys() == {f".trash/{name}" for name in before}
    assert (tmp_path / "outside" / "a.jpg").read_bytes() == b"mine"


def test_a_trash_that_is_a_link_is_refused(store: Store, catalog: Catalog, tmp_path: Path) -> None:
    images = made(store, catalog, "images", 1)
    (tmp_path / "outside").mkdir()
    (root_of(store) / ".trash").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="is a link or a file"):
        collect(store, catalog, Request(1))
    assert there(store) == {images.fingerprint}
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("moved", [False, True])
def test_killed_in_the_middle_every_artifact_is_whole_or_gone(
    store: Store, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    """Before or after the move of the second of three; what was moved is whole in the trash."""
    artifacts = [made(store, catalog, "images", number) for number in range(3)]
    rename, calls = Path.rename, []

    def killed(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) < 2 or moved:
            rename(self, target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return target

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(store, catalog, Request(1))
    gone = {path.name for path in trashed(store)}
    assert len(gone) == 1 + moved
    assert there(store) == names(artifacts) - gone
    assert all(Artifact.open(Folder.at(path)).problems(deep=True) == [] for path in trashed(store))
    assert cleaned(store, catalog) == names(artifacts) - gone
    assert {path.name for path in trashed(store)} == names(artifacts)


def test_killed_while_the_trash_is_emptied_nothing_half_can_be_put_back(
    store: Store, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = made(store, catalog, "images", 1)
    collect(store, catalog, Request(1))
    grow_old(store)

    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edt_core.store.trash.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(store, catalog, Request(1))
    (path,) = trashed(store)
    assert (path / images.manifest.attempt / "a.bin").exists()
    assert not (path / MANIFEST_NAME).exists()  # put back, it is an artifact that was not finished
    assert len(collect(store, catalog, Request(1)).discarded) == 1
    assert trashed(store) == []


def test_what_cannot_be_moved_stays_and_is_told(
    store: Store, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a kind lies on a disk of its own."""
    images = made(store, catalog, "images", 1)

    def refused(self: Path, target: Path) -> Path:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "rename", refused)
    done = edt("gc", "--store", str(root_of(store)), "--yes")
    assert done.returncode == 1
    assert f"not removed: images/{images.fingerprint}: cannot be moved to" in done.stderr
    assert there(store) == {images.fingerprint}
    assert not (root_of(store) / ".trash").exists()


@pytest.mark.parametrize("bucket", ["memory://{}", pytest.param("s3", marks=pytest.mark.extern)])
def test_an_object_store_has_no_trash_and_the_manifest_goes_first(
    bucket: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_empty_mlflow(tmp_path / "mlflow")
    catalog = Catalog.open(Folder.at(tmp_path / "mlflow"), "gc")
    root = request.getfixturevalue("s3") if bucket == "s3" else bucket.format(tmp_path.name)
    store = Store.open(f"{root}/store")
    images, latents = made(store, catalog, "images", 1), made(store, catalog, "latents", 1)
    store.root.write_bytes("images/notes.txt", b"mine")
    store.root.write_bytes("images/mine/a.jpg", b"mine")
    store.root.write_bytes(f"images/{'d' * 64}", b"mine")
    begun(store, catalog, "features", "a" * 64)
    assert len(plan(store, catalog, Request(1)).garbage) == 3
    whole, killed_once = Folder.remove, []

    def killed(self: Folder, name: str) -> None:
        whole(self, name)
        if not killed_once and name.endswith(MANIFEST_NAME):
            killed_once.append(name)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(store, catalog, Request(1))
    assert there(store) == {latents.fingerprint}
    done = collect(store, catalog, Request(1))
    assert ({item.fingerprint for item in done.garbage}, done.trash) == ({*names([images, latents]), "a" * 64}, None)
    assert done.left_alone.keys() == {"images/notes.txt", "images/mine", f"images/{'d' * 64}"}
    left = {name for name in store.root.walk() if not name.startswith(".")}
    assert left == {"images/notes.txt", "images/mine/a.jpg", f"images/{'d' * 64}"}
    assert collect(store, catalog, Request(1, force=True)).garbage == []


# --- what else deletes


def test_the_cache_evicts_its_own_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EDT_CACHE_DIR is a folder that its user has files in, under the very names of the cache's folders."""
    monkeypatch.setenv("EDT_CACHE_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("EDT_CACHE_BYTES", "3000")
    mine = ("files/report.pdf", "files/2024/tax.pdf", "files/0123456789abcdef/own.bin", "files/.x.part", "mine.txt")
    mine += ("objects/ab/notes.txt", f"objects/{'c' * 64}", "objects/ab/.notes.part", "views/a/b")
    (tmp_path / "outside").write_bytes(b"outside" * 1000)
    for name in mine:
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine" * 1000)
    (tmp_path / "home" / "objects" / "ab" / ("ab" * 32)).symlink_to(tmp_path / "outside")
    for number in range(4):  # each needs the room of those before it
        out = ArtifactWriter(Folder.at(f"memory://{tmp_path.name}/{number}"), "images", "0" * 64, "a1")
        out.write_bytes("a.bin", bytes([number]) * 2000)
        assert out.commit({}, {}, {}).path("a.bin").read_bytes()[0] == number
        Folder.at(f"memory://{tmp_path.name}/files").write_bytes(f"{number}.bin", bytes([number]) * 2000)
        local_copy(Folder.at(f"memory://{tmp_path.name}/files"), f"{number}.bin")
    assert all((tmp_path / "home" / name).read_bytes() == b"mine" * 1000 for name in mine)
    assert (tmp_path / "outside").read_bytes() == b"outside" * 1000
    assert (tmp_path / "home" / "objects" / "ab" / ("ab" * 32)).is_symlink()
    cache = Cache.of_node()
    files = Room(cache.root, cache.bound, cache._lock)._files()
    own = [path for path in files if path.stat().st_size == 2000]
    assert len(own) == 1  # and its own it does evict


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.bin").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "outside")
    Folder.at(tmp_path / "folder").remove("link")
    assert list((tmp_path / "folder").iterdir()) == []
    assert (tmp_path / "outside" / "a.bin").read_bytes() == b"mine"


def test_a_commit_sweeps_only_what_was_staged(tmp_path: Path) -> None:
    for name in (".staging-notes", f".staging-{'0' * 32}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_bytes(b"mine")
    out = ArtifactWriter(Folder.at(tmp_path), "images", "0" * 64)
    out.check_own()
    out.write_bytes("a.bin", b"a")
    out.commit({}, {}, {})
    assert (tmp_path / ".staging-notes" / "a.txt").read_bytes() == b"mine"
    assert not (tmp_path / f".staging-{'0' * 32}").exists()


def test_a_folder_with_a_journal_of_its_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".journal").mkdir()
    (tmp_path / ".journal" / "2026.md").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"contains 1 files that this run did not write \(\.journal/2026\.md\)"):
        ArtifactWriter(Folder.at(tmp_path), "images", "0" * 64).check_own()


def test_a_checkpoint_that_was_moved_and_linked_is_not_pruned_where_it_lies(tmp_path: Path) -> None:
    out = ArtifactWriter(Folder.at(tmp_path / "out"), "checkpoint", "0" * 64)
    out.write_bytes("checkpoints/step-00000004/checkpoint.json", b"{}")
    (tmp_path / "out" / "checkpoints" / "step-00000004").rename(tmp_path / "moved")
    (tmp_path / "out" / "checkpoints" / "step-00000004").symlink_to(tmp_path / "moved")
    store = CheckpointStore(out, 1, pytest.fail)
    store.prune()
    assert store.steps() == []
    assert (tmp_path / "moved" / "checkpoint.json").read_bytes() == b"{}"


def test_images_where_the_digits_go_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred of the digits: each time all are written."""
    with np.load(digits._FILE) as every:
        np.savez(tmp_path / "few.npz", **{name: every[name][:100] for name in every})
    monkeypatch.setattr(digits, "_FILE", tmp_path / "few.npz")
    monkeypatch.setattr(digits, "NUM_DIGITS", 100)
    root = tmp_path / "sources" / "digits"
    (root / "3").mkdir(parents=True)
    (root / "3" / "00003.png").write_bytes(b"mine")  # by its name it could be one of ours
    with pytest.raises(UserError, match="contains 1 other files"):
        write_digits(root)
    assert (root / "3" / "00003.png").read_bytes() == b"mine"
    assert os.listdir(root.parent) == ["digits"]
    (root / "3" / "00003.png").unlink()
    write_digits(root)
    next(root.glob("5/*.png")).unlink()  # of ours, one is lost: nothing is lost with the others
    assert len(list(write_digits(root).glob("*/*.png"))) == 100
    next(root.glob("5/*.png")).unlink()
    (root / "notes.txt").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"as .*notes\.txt"):
        write_digits(root)
    root.rename(tmp_path / "elsewhere")
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="contains 1 other files"):
        write_digits(root)
    assert (tmp_path / "elsewhere" / "notes.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_where_an_export_would_stage_is_not_removed(tmp_path: Path, linked: bool) -> None:
    import numpy as np

    from edt_core.data.export import export_samples

    batch = (np.arange(2), np.arange(2), np.zeros((2, 4, 4, 3), np.uint8))
    hidden = tmp_path / ".samples.exporting"
    mine = tmp_path / "mine" if linked else hidden
    mine.mkdir()
    (mine / ("whole" if linked else "notes.txt")).write_bytes(b"mine")
    if linked:
        hidden.symlink_to(mine)
    before = snapshot(mine)
    with pytest.raises(UserError, match="it does not belong to an export"):
        export_samples("png", [batch], 2, tmp_path / "samples")
    assert snapshot(mine) == before
    assert not (tmp_path / "samples").exists()
    hidden.unlink() if linked else shutil.rmtree(hidden)
    export_samples("png", [batch], 2, tmp_path / "samples")
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_a_pull_removes_nothing_that_no_pull_has_left(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "store")
    registry.add("a", 1.0)
    version, target = registry.version("1"), tmp_path / "pulled" / "model"
    (target / "sub").mkdir(parents=True)
    (target / "sub" / "mine.txt").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"does not contain .*sub/mine\.txt is not in"):
        pull(registry.catalog.client, version, target)
    assert snapshot(target) == {"sub/mine.txt": b"mine"}
    shutil.rmtree(target)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.txt").write_bytes(b"mine")
    (target.parent / ".model.pull-anything-else" / "model").mkdir(parents=True)
    (target.parent / ".model.pull-mynotes1").mkdir()
    (target.parent / ".model.pull-mynotes1" / "a.txt").write_bytes(b"mine")
    (target.parent / ".model.pull-linked01").symlink_to(tmp_path / "outside")
    (target.parent / ".model.pull-killed01" / "model").mkdir(parents=True)
    assert pull(registry.catalog.client, version, target)
    left = {path.name for path in target.parent.iterdir()}
    assert left == {"model", ".model.pull-anything-else", ".model.pull-mynotes1", ".model.pull-linked01"}
    assert (tmp_path / "outside" / "a.txt").read_bytes() == b"mine"


def test_a_schedule_is_removed_by_its_name_and_not_by_a_path(tmp_path: Path) -> None:
    for name in ("store", "other"):
        shutil.copytree(scheduled(tmp_path / "made"), tmp_path / name, dirs_exist_ok=True)
    with pytest.raises(UserError, match="no schedule"):
        Schedules.at(str(tmp_path / "store")).remove("../../other/.schedules/nightly")
    assert Schedules.at(str(tmp_path / "other")).names() == ["nightly"]
    mine = tmp_path / "store" / ".schedules" / "nightly.txt"
    mine.write_bytes(b"mine")
    Schedules.at(str(tmp_path / "store")).remove("nightly")
    assert mine.read_bytes() == b"mine"


def scheduled(store: Path) -> Path:
    """A store with the schedule `nightly`."""
    if not store.exists():
        line = ("schedule", "quickstart", "--cron", "0 3 * * *", "--name", "nightly", "--no-serve")
        assert edt(*line, "--store", str(store)).returncode == 0
    return store


def test_old_logs_of_schedules_go_and_other_logs_stay(tmp_path: Path) -> None:
    server = Server(Schedules.at(str(tmp_path)), print)
    work = server.schedules.workplace
    work.mkdir(parents=True)
    for number in range(60):
        (work / f"nightly-20260101T0000{number:02d}Z-1.log").write_bytes(b"")
        os.utime(work / f"nightly-20260101T0000{number:02d}Z-1.log", (number, number))
    (work / "mine.log").write_bytes(b"mine")
    os.utime(work / "mine.log", (0, 0))
    server._prune_logs()
    assert (work / "mine.log").read_bytes() == b"mine"
    assert len(list(work.glob("nightly-*.log"))) == 50


def test_init_writes_over_nothing_of_its_user(tmp_path: Path, digits_folder: Path) -> None:
    (tmp_path / ".edt.partial.yaml").write_bytes(b"mine")
    done = edt("init", "--images", str(digits_folder), "--yes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".edt.partial.yaml").read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {".edt.partial.yaml", "edt.yaml"}
    (tmp_path / "linked.yaml").symlink_to("nowhere.yaml")
    done = edt("init", "--images", str(digits_folder), "--yes", "--out", "linked.yaml", cwd=tmp_path)
    assert (done.returncode, (tmp_path / "linked.yaml").is_symlink()) == (2, True)

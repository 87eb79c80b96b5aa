"""Checkpoints: none that is damaged is used, the right ones are kept, and nothing of the others is left."""

import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.errors import UserError
from edt_core.store.artifact import ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import (
    CHECKPOINT_MANIFEST,
    CHECKPOINT_VERSION,
    EMA_WEIGHTS,
    MODEL_CONFIG,
    MODEL_WEIGHTS,
    OPTIMIZER_STATE,
    TRAIN_STATE,
)
from edt_core.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointManifest,
    check_checkpoint,
    check_resumable,
    checkpoint_name,
    load_checkpoint,
    read_manifest,
)
from edt_core.training.shard import files as tensor_files
from edt_core.training.store import CheckpointStore, best_step, to_keep
from tests.support.trainings import place, with_version

FILES = [CHECKPOINT_MANIFEST, EMA_WEIGHTS, MODEL_CONFIG, MODEL_WEIGHTS, OPTIMIZER_STATE, TRAIN_STATE]


def made(step: int, score: float | None = None, *, regular: bool = True) -> Checkpoint:
    """A small checkpoint of three files of tensors, different at each step."""
    tensors = {
        name: {"a": torch.arange(6.0) + 100 * step + k, "b": torch.tensor(step, dtype=torch.int64)}
        for k, name in enumerate((MODEL_WEIGHTS, EMA_WEIGHTS, OPTIMIZER_STATE))
    }
    return Checkpoint(step, tensors, {"note": f"at {step}"}, {"name": "none"}, score, regular)


def store_at(
    folder: Path | str,
    warnings: list[str] | None = None,
    *,
    num_to_keep: int = 100,
    attempt: str = "",
    previous: tuple[str, ...] = (),
) -> CheckpointStore:
    out = ArtifactWriter(Folder.at(folder), "checkpoint", "0" * 64, attempt, previous)
    return CheckpointStore(out, num_to_keep, [].append if warnings is None else warnings.append)


def fill(store: CheckpointStore, *steps: int) -> CheckpointStore:
    for step in steps:
        store.save(made(step))
    store.flush()
    return store


def journalled_steps(folder: Path) -> set[int]:
    names = [path.name.split("%2F")[1] for path in (folder / ".journal").glob("checkpoints*.json")]
    return {int(name.removeprefix("step-")) for name in names}


def steps_on_disk(folder: Path) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir()}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return (a.step, a.state, a.model_config, a.score, a.regular) == (
        b.step,
        b.state,
        b.model_config,
        b.score,
        b.regular,
    ) and all(
        a.tensors[file].keys() == tensors.keys()
        and all(torch.equal(a.tensors[file][name], value) for name, value in tensors.items())
        and all(a.tensors[file][name].dtype == value.dtype for name, value in tensors.items())
        for file, tensors in b.tensors.items()
    )


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_checkpoint_is_read_as_it_was_written(where: str, tmp_path: Path) -> None:
    """On a disk, and in a store where files are fetched first."""
    location = tmp_path if where == "local" else f"memory://{tmp_path.name}-checkpoints"
    store = store_at(location)
    for number, (score, regular) in enumerate([(0.25, True), (None, True), (None, False)], start=1):
        saved = made(number, score, regular=regular)
        store.save(saved)
        assert store.newest() == number
        assert same(store.load(number), saved)
    assert store.steps() == [1, 2, 3]


def test_what_is_written_is_the_training_at_the_moment_of_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are done while a checkpoint is being written, and the next one's copies, leave it as it was."""
    go = threading.Event()
    slowly = tensor_files.save_file

    def waiting(tensors: dict[str, torch.Tensor], path: Path, *_: object) -> None:
        assert go.wait(600)
        slowly(tensors, path)

    monkeypatch.setattr(tensor_files, "save_file", waiting)
    store, training = store_at(tmp_path), made(1)
    store.save(training)
    for tensors in training.tensors.values():
        tensors["a"].fill_(-1)
    threading.Timer(0.05, go.set).start()
    store.save(made(2))  # into the same memory: only when the first is written
    store.flush()
    assert same(store.load(1), made(1))
    assert same(store.load(2), made(2))


def test_there_is_nothing_to_unpickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(store_at(tmp_path), 4)
    assert {path.suffix for path in place(tmp_path, 4).iterdir()} == {".safetensors", ".json"}

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(module, name, refuse)
    assert same(store.load(4), made(4))


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    store = fill(store_at(tmp_path), 4)
    (place(tmp_path, 4) / "extra.safetensors").write_bytes(b"anything")
    assert same(store.load(4), made(4))


@pytest.mark.parametrize("name", FILES)
def test_no_flipped_bit_and_no_cut_is_overlooked(name: str, tmp_path: Path) -> None:
    fill(store_at(tmp_path), 4)
    path = place(tmp_path, 4) / name
    data = path.read_bytes()
    damages: list[bytes] = [data[:cut] for cut in range(0, len(data), 17)]
    for bit in range(0, 8 * len(data), 23):
        flip(path, bit)
        damages.append(path.read_bytes())
        path.write_bytes(data)
    for damaged in [*damages, data + b"x", data + data]:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="step-00000004"):
            load_checkpoint(place(tmp_path, 4))
    path.write_bytes(data)
    assert check_checkpoint(place(tmp_path, 4)).step == 4


def test_no_flipped_bit_changes_what_a_manifest_says(tmp_path: Path) -> None:
    """Every bit of it. One that only spells the same score in another way is the one kind that may pass."""
    store = store_at(tmp_path)
    store.save(made(4, score=1.0 / 3))
    store.flush()
    data = (place(tmp_path, 4) / CHECKPOINT_MANIFEST).read_bytes()
    whole, passed = read_manifest(data, "here"), 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << (bit % 8)
        try:
            assert read_manifest(bytes(damaged), "here") == whole
            passed += 1
        except CheckpointError:
            pass
    assert passed < 8


def test_another_version_s_checkpoint_is_refused(tmp_path: Path) -> None:
    fill(store_at(tmp_path), 4)
    for version in (1, CHECKPOINT_VERSION + 1):
        with_version(place(tmp_path, 4), version)
        with pytest.raises(CheckpointError, match=f"checkpoint version {version}; this code reads 2 and 3"):
            check_checkpoint(place(tmp_path, 4))


def test_the_version_before_can_be_read_but_not_resumed_from(tmp_path: Path) -> None:
    fill(store_at(tmp_path), 4)
    now = load_checkpoint(place(tmp_path, 4))
    before = load_checkpoint(with_version(place(tmp_path, 4), 2))
    assert (now.version, before.version) == (3, 2)
    assert same(before, now)
    assert store_at(tmp_path).newest() == 4
    check_resumable(now, "here")
    with pytest.raises(UserError, match=r"here has checkpoint version 2: .* with train.init_from=here, or resume with"):
        check_resumable(before, "here")


def missing(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    flip(path, 4 * path.stat().st_size)


@pytest.mark.parametrize("damage", [missing, cut, emptied, flipped])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    name: str, damage: Callable[[Path], None], tmp_path: Path
) -> None:
    warnings: list[str] = []
    store = fill(store_at(tmp_path, warnings), 4, 8, 12)
    damage(place(tmp_path, 12) / name)
    assert store.newest() == 8
    assert len(warnings) == 1
    assert warnings[0].index("step-00000012") < warnings[0].index(f"{checkpoint_name(8)} instead")
    assert steps_on_disk(tmp_path) == {4, 8} == journalled_steps(tmp_path)
    assert store.newest() == 8
    assert len(warnings) == 1  # told once
    store.save(made(12))
    assert store.newest() == 12


def test_where_all_are_damaged_it_is_the_start(tmp_path: Path) -> None:
    warnings: list[str] = []
    store = fill(store_at(tmp_path, warnings), 4, 8)
    for step in (4, 8):
        flipped(place(tmp_path, step) / EMA_WEIGHTS)
    assert store.newest() is None
    assert [step for step in (4, 8) if any(checkpoint_name(step) in warning for warning in warnings)] == [4, 8]
    assert all("resuming from the start instead" in warning for warning in warnings)
    assert store.steps() == []
    assert journalled_steps(tmp_path) == set()


def test_without_checkpoints_nothing_is_found_and_nobody_warned(tmp_path: Path) -> None:
    warnings: list[str] = []
    assert store_at(tmp_path, warnings).newest() is None
    store_at(tmp_path, warnings, attempt="a2", previous=("a1",)).adopt()
    assert warnings == []


def manifest(step: int, score: float | None, regular: bool) -> CheckpointManifest:
    return CheckpointManifest(step, regular, score, {}, "")


def drawn_manifests(rng: np.random.Generator) -> dict[int, CheckpointManifest]:
    steps = sorted(rng.choice(100, size=int(rng.integers(0, 12)), replace=False).tolist())
    scores = rng.integers(0, 5, len(steps)).astype(float).tolist()  # few values: some are equal
    return {
        step: manifest(step, None if rng.random() < 0.2 else score, bool(rng.random() < 0.7))
        for step, score in zip(steps, scores, strict=True)
    }


def test_the_best_is_the_regular_one_of_least_loss() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        found = drawn_manifests(rng)
        scored = [m for m in found.values() if m.regular and m.score is not None]
        best = best_step(found)
        assert (best is None) == (not scored)
        if best is not None:
            assert all((found[best].score, best) <= (m.score, m.step) for m in scored)
            assert found[best] in scored


@pytest.mark.parametrize("num_to_keep", [1, 2, 5])
def test_kept_are_the_newest_the_best_and_one_out_of_turn(num_to_keep: int) -> None:
    rng = np.random.default_rng(num_to_keep)
    for _ in range(300):
        found = drawn_manifests(rng)
        regular = [step for step in sorted(found) if found[step].regular]
        kept, at_end = to_keep(found, num_to_keep), to_keep(found, num_to_keep, at_end=True)
        assert kept <= set(found)
        assert all(found[step].regular for step in at_end)
        for step in found:
            newer = sum(other > step for other in regular)
            wanted = found[step].regular and (newer < num_to_keep or step == best_step(found))
            assert (step in at_end) == wanted
            assert (step in kept) == (wanted or step == max(found))


def test_checkpoints_of_every_so_many_steps_are_never_removed(tmp_path: Path) -> None:
    store = store_at(tmp_path, num_to_keep=1)
    store.keep_every = 3
    for step in range(1, 9):
        store.save(made(step, float(step), regular=step % 2 == 0))
    store.flush()
    assert store.prune(at_end=True) == [2, 3, 6, 8]  # 2 is the best


@pytest.mark.parametrize("num_to_keep", [1, 3])
def test_a_store_keeps_what_it_says_and_nothing_else(num_to_keep: int, tmp_path: Path) -> None:
    store, saved = store_at(tmp_path, num_to_keep=num_to_keep), {}
    for step, (score, regular) in enumerate(
        [(0.5, True), (0.1, True), (None, False), (0.4, True), (0.3, True), (None, False), (0.2, True), (None, False)]
    ):
        store.save(made(step, score, regular=regular))
        store.flush()
        saved[step] = manifest(step, score, regular)
        saved = {kept: saved[kept] for kept in to_keep(saved, num_to_keep)}
        assert store.steps() == sorted(saved)
        assert steps_on_disk(tmp_path) == set(saved) == journalled_steps(tmp_path)
    assert store.prune(at_end=True) == sorted(to_keep(saved, num_to_keep, at_end=True))
    assert 1 in steps_on_disk(tmp_path)  # the best
    assert 7 not in steps_on_disk(tmp_path)  # out of turn
    assert steps_on_disk(tmp_path) == journalled_steps(tmp_path)
    assert all(same(store.load(step), made(step, saved[step].score)) for step in store.steps())


def test_it_is_told_when_a_checkpoint_was_written(tmp_path: Path) -> None:
    told: list[list[int]] = []
    out = ArtifactWriter(Folder.at(tmp_path), "checkpoint", "0" * 64)
    store = CheckpointStore(out, 2, [].append, changed=lambda store: told.append(store.steps()))
    fill(store, 1, 2, 3)
    assert told == [[1], [1, 2], [2, 3]]


def test_a_writing_that_failed_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(store_at(tmp_path), 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full)
    store.save(made(2))
    with pytest.raises(ValueError, match=r"No space left|no space|full"):
        store.flush()
    with pytest.raises(ValueError, match=r"No space left|no space|full"):
        store.check()
    monkeypatch.undo()
    later = store_at(tmp_path)
    assert later.newest() == 1
    assert same(later.load(1), made(1))


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_later_attempt_takes_over_and_prunes(where: str, tmp_path: Path) -> None:
    location = tmp_path if where == "local" else f"memory://{tmp_path.name}-adopt"
    warnings: list[str] = []
    fill(store_at(location, attempt="a1"), 4, 8, 12)
    store = store_at(location, warnings, attempt="a2", previous=("a1",), num_to_keep=2)
    store.adopt()
    assert store.steps() == [8, 12]
    assert store.newest() == 12
    assert all(same(store.load(step), made(step)) for step in (8, 12))
    assert warnings == []
    written = {entry.path for entry in store.out.written()}
    assert written == {f"checkpoints/{checkpoint_name(step)}/{name}" for step in (8, 12) for name in FILES}
    store.adopt()  # a second time it is all there
    assert store.steps() == [8, 12]


def test_checkpoints_come_from_several_attempts(tmp_path: Path) -> None:
    fill(store_at(tmp_path, attempt="a1"), 4, 8)
    fill(store_at(tmp_path, attempt="a2"), 12)
    store = store_at(tmp_path, attempt="a3", previous=("a2", "a1"))
    store.adopt()
    assert store.steps() == [4, 8, 12]


@pytest.mark.parametrize("damage", [missing, cut, emptied, flipped])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_one_is_not_taken_over(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    """One whose manifest is missing was not finished: nobody lost anything, and nobody is told."""
    warnings: list[str] = []
    fill(store_at(tmp_path, attempt="a1"), 4, 8)
    damage(place(tmp_path / "a1", 8) / name)
    store = store_at(tmp_path, warnings, attempt="a2", previous=("a1",))
    store.adopt()
    assert store.newest() == 4
    assert steps_on_disk(tmp_path / "a2") == {4} == journalled_steps(tmp_path / "a2")
    if (name, damage) == (CHECKPOINT_MANIFEST, missing):
        assert warnings == []
    else:
        assert len(warnings) == 1
        assert warnings[0].index("step-00000008") < warnings[0].index(f"{checkpoint_name(4)} instead")


def test_a_half_written_one_is_not_taken_over(tmp_path: Path) -> None:
    warnings: list[str] = []
    earlier = fill(store_at(tmp_path, attempt="a1"), 4)
    earlier.out.write_bytes(f"checkpoints/{checkpoint_name(8)}/{MODEL_WEIGHTS}", b"half")
    store = store_at(tmp_path, warnings, attempt="a2", previous=("a1",))
    store.adopt()
    assert store.steps() == [4]
    assert warnings == []


def manifest_is_gone(folder: Path) -> None:
    (place(folder, 4) / CHECKPOINT_MANIFEST).unlink()


def files_are_gone(folder: Path) -> None:
    shutil.rmtree(place(folder, 4))


def some_files_are_gone(folder: Path) -> None:
    for name in (CHECKPOINT_MANIFEST, MODEL_WEIGHTS):
        (place(folder, 4) / name).unlink()


@pytest.mark.parametrize("interrupt", [manifest_is_gone, files_are_gone, some_files_are_gone])
@pytest.mark.parametrize("newer", [(8,), ()])
def test_an_interrupted_removal_is_finished(
    interrupt: Callable[[Path], None], newer: tuple[int, ...], tmp_path: Path
) -> None:
    fill(store_at(tmp_path), 4, *newer)
    interrupt(tmp_path)
    store = store_at(tmp_path)
    assert store.steps() == [4, *newer]  # it is still known that something is there
    store.adopt()
    assert store.steps() == list(newer)
    assert steps_on_disk(tmp_path) == set(newer) == journalled_steps(tmp_path)


def test_a_removal_that_is_interrupted_anywhere_leaves_nothing_to_be_taken_for_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal is cut after each of its parts in turn."""
    remove = Folder.remove
    for parts in range(2 + len(FILES)):
        folder = tmp_path / str(parts)
        store, done = fill(store_at(folder), 4, 8), []

        def cut_short(self: Folder, name: str, parts: int = parts, done: list[str] = done) -> None:
            if len(done) == parts:
                raise KeyboardInterrupt
            done.append(name)
            remove(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(Folder, "remove", cut_short)
            with pytest.raises(KeyboardInterrupt):
                store.remove(8)
        later = store_at(folder)
        later.adopt()
        assert later.newest() == (8 if parts == 0 else 4)
        assert steps_on_disk(folder) == journalled_steps(folder) == ({4, 8} if parts == 0 else {4})

"""What goes wrong: a killed training, a full disk, numbers that are not finite. Nothing of it is trained on in silence.

Run as a module, this file trains in processes that kill themselves in the middle of writing checkpoints.
"""

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset, LatentShard, write_latent_tar
from edt_core.data.randomness import epoch_order
from edt_core.data.scale import LatentScale
from edt_core.data.streaming.tars import TarShard, TarStream
from edt_core.diffusion.timesteps import UniformSampler
from edt_core.errors import UserError
from edt_core.models import ModelConfig
from edt_core.store import folder as storage
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder, sha256_file
from edt_core.training import loop, trainer
from edt_core.training.checkpoint import load_checkpoint
from edt_core.training.context import LocalContext, Request
from edt_core.training.loop import train
from edt_core.training.shard import files as tensor_files
from edt_core.training.state import TrainState, initial_state
from edt_core.training.trainer import NotFiniteError
from tests.support.cases import suite_of
from tests.support.gloo import run_forked
from tests.support.trainings import contents, cut_back, narrow, place, same

pytestmark = pytest.mark.usefixtures("quickly", "one_thread", "no_thread_stays")

CONFIG = TrainConfig(
    model="EDT-Tiny/2",
    global_batch_size=8,
    max_steps=10,
    lr=2e-3,
    masked_loss=False,  # a second pass, to which nothing here refers
    ema_decay=(0.9, 0.5),
    log_every=3,
    checkpoint_every=4,
)
ROWS = 96  # 12 steps an epoch: no row comes twice
KILLED = CONFIG.model_copy(update={"max_steps": 4, "checkpoint_every": 1})


@pytest.fixture(scope="module")
def edt() -> ModelConfig:
    return narrow()


class _Spoiled(LatentDataset):
    """A data set some rows of which have another value: huge, or not a number."""

    def __init__(self, paths: list[Path], rows: list[int], value: float) -> None:
        super().__init__(paths)
        self.rows, self.value = rows, value

    def gather(self, indices, mirror, out=None):
        posterior, labels = super().gather(indices, mirror, out)
        posterior[np.isin(indices, self.rows), 0] = self.value
        return posterior, labels


def row_of(step: int, number: int = 3) -> int:
    """A row that step `step` takes, and no other does."""
    return int(epoch_order(CONFIG.seed, 0, ROWS)[step * CONFIG.global_batch_size + number])


def spoiled(artifact: Artifact, *steps: int, value: float = 1e30) -> _Spoiled:
    return _Spoiled(artifact.paths("*.arrow"), [row_of(step) for step in steps], value)


def with_options(**options: object) -> TrainConfig:
    return TrainConfig.model_validate({**CONFIG.model_dump(), **options})


def require_all_finite(state: TrainState, folder: Path) -> None:
    """Weights, averages, the sampler, and every tensor of every checkpoint."""
    kept = [state.model.state_dict(), *state.ema.averages]
    kept.append({name: torch.from_numpy(value) for name, value in state.timesteps.state_dict().items()})
    for path in (folder / "checkpoints").iterdir():
        kept += load_checkpoint(path).tensors.values()
    for tensors in kept:
        for name, value in tensors.items():
            assert torch.isfinite(value.double()).all(), name
    assert len(kept) > 6


# --- numbers that are not finite


# Before the first checkpoint, and at the end; the others are like these.
@pytest.mark.parametrize("step", suite_of([0, 9], [0, 2, 4, 5, 9]))
def test_a_step_whose_loss_is_not_finite_is_left_out(
    step: int, edt: ModelConfig, latents_artifact: Artifact, tmp_path: Path
) -> None:
    context = LocalContext(tmp_path)
    state = train(CONFIG, edt, spoiled(latents_artifact, step), context)
    assert (state.step, state.skipped, state.rollbacks) == (10, {step}, 1)
    require_all_finite(state, tmp_path)
    named, rolled_back = context.warnings
    assert f"loss of step {step} is not finite for 1 of 8 samples: rows {row_of(step)} " in named
    assert f"step {step}" in rolled_back
    assert f"rolled back to step {step // 4 * 4}," in rolled_back
    assert "rollback 1 of at most 3" in rolled_back
    assert [row for row in context.reported if "rollbacks" in row] == [{"step": float(step), "rollbacks": 1.0}]
    assert all(math.isfinite(value) for row in context.reported for value in row.values())
    assert [row["step"] for row in state.history.rows] == [3, 6, 9] + ([10] if step < 9 else [])


@pytest.mark.parametrize("step", [1, 5])
def test_it_is_the_training_without_that_step(
    step: int, edt: ModelConfig, dataset: LatentDataset, latents_artifact: Artifact, tmp_path: Path
) -> None:
    """Nothing of what it did before it went back is left."""
    state = train(CONFIG, edt, spoiled(latents_artifact, step), LocalContext(tmp_path / "a"))

    def leaving_out(*inputs: object) -> TrainState:
        return replace(initial_state(*inputs), skipped={step}, rollbacks=1)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "initial_state", leaving_out)
        expected = train(CONFIG, edt, dataset, LocalContext(tmp_path / "b"))
    assert same(state.model.state_dict(), expected.model.state_dict())
    assert state.history == expected.history
    assert contents(place(tmp_path / "a", 10)) == contents(place(tmp_path / "b", 10))


@pytest.mark.parametrize("resumed_at", [4, 8])
def test_a_training_that_went_back_is_resumed_exactly(
    resumed_at: int, edt: ModelConfig, latents_artifact: Artifact, tmp_path: Path
) -> None:
    """Before it went back, and after: the step stays left out."""
    poisoned = spoiled(latents_artifact, 5)
    train(CONFIG, edt, poisoned, LocalContext(tmp_path / "a"))
    context = cut_back(tmp_path / "a", tmp_path / "b", resumed_at)
    state = train(CONFIG, edt, poisoned, context)
    assert (state.skipped, state.rollbacks) == ({5}, 1)
    assert len(context.warnings) == (2 if resumed_at == 4 else 0)
    assert contents(place(tmp_path / "a", 10)) == contents(place(tmp_path / "b", 10))


@pytest.mark.parametrize("most", suite_of([0, 3], [0, 1, 3]))
def test_more_bad_steps_than_max_rollbacks_end_the_training(
    most: int, edt: ModelConfig, latents_artifact: Artifact, tmp_path: Path
) -> None:
    bad = [1, 2, 5, 6][: most + 1]
    context = LocalContext(tmp_path)
    with pytest.raises(NotFiniteError, match=f"step {bad[-1]} is not finite.*max_rollbacks is {most}.*lower lr"):
        train(with_options(max_rollbacks=most), edt, spoiled(latents_artifact, *bad), context)
    assert [row["rollbacks"] for row in context.reported if "rollbacks" in row] == [k + 1.0 for k in range(most)]
    assert not (place(tmp_path, bad[-1] + 1)).exists()


def test_as_many_bad_steps_as_max_rollbacks_are_got_over(
    edt: ModelConfig, latents_artifact: Artifact, tmp_path: Path
) -> None:
    state = train(CONFIG, edt, spoiled(latents_artifact, 1, 2, 5), LocalContext(tmp_path))
    assert (state.step, state.skipped, state.rollbacks) == (10, {1, 2, 5}, 3)
    require_all_finite(state, tmp_path)


def test_rollbacks_are_counted_over_restarts(edt: ModelConfig, latents_artifact: Artifact, tmp_path: Path) -> None:
    config, poisoned = with_options(max_rollbacks=1), spoiled(latents_artifact, 1, 6)
    for _ in range(2):  # tried again, it goes on from step 4 and fails again
        with pytest.raises(NotFiniteError, match="step 6"):
            train(config, edt, poisoned, LocalContext(tmp_path))
        assert LocalContext(tmp_path).store.steps() == [4]


@pytest.mark.parametrize(
    ("value", "options"),
    suite_of(
        [(math.inf, {"max_grad_norm": 1.0}), (math.nan, {"optimizer": "adamw"})],
        product((math.inf, math.nan), ({"max_grad_norm": 1.0}, {"optimizer": "adamw"})),
    ),
    ids=str,
)
def test_a_gradient_that_is_not_finite_is_left_out(
    value: float,
    options: dict[str, object],
    edt: ModelConfig,
    dataset: LatentDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though all losses are finite; that of step 6, in one place of one parameter."""
    accumulate, calls = trainer.accumulate_gradient, []

    def spoiling(model: torch.nn.Module, *inputs: object) -> torch.Tensor:
        losses = accumulate(model, *inputs)  # type: ignore[arg-type]
        calls.append(losses)
        if len(calls) == 7:
            list(model.parameters())[-3].grad.view(-1)[1] = value  # type: ignore[union-attr]
        return losses

    monkeypatch.setattr(trainer, "accumulate_gradient", spoiling)
    context = LocalContext(tmp_path)
    state = train(with_options(**options), edt, dataset, context)
    assert all(torch.isfinite(losses).all() for losses in calls)
    assert (state.step, state.skipped, state.rollbacks) == (10, {6}, 1)
    require_all_finite(state, tmp_path)
    assert "the gradient of step 6 is not finite" in context.warnings[0]
    assert all(str(row) in context.warnings[0] for row in [row_of(6, number) for number in range(3)])
    assert [row for row in context.reported if "rollbacks" in row] == [{"step": 6.0, "rollbacks": 1.0}]


# --- where the timesteps do not depend on the losses: checked one step late


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the other sampler: each step is checked before the next one begins."""
    monkeypatch.setattr(UniformSampler, "needs_losses", True)


def order_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done when: the update of a step, and the look at its result."""
    done: list[str] = []
    update, result = trainer.Trainer._update, trainer.Launched.result

    def updating(self: trainer.Trainer, norm: torch.Tensor, wanted: torch.Tensor | None = None) -> None:
        done.append(f"update {self.state.step}")
        update(self, norm, wanted)

    def looking(self: trainer.Launched) -> trainer.StepResult:
        done.append(f"check {self.batch.step}")
        return result(self)

    monkeypatch.setattr(trainer.Trainer, "_update", updating)
    monkeypatch.setattr(trainer.Launched, "result", looking)
    return done


def test_a_step_is_checked_after_the_next_has_begun_or_before_something_is_written(
    edt: ModelConfig, dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = order_of(monkeypatch)
    options = {"max_steps": 5, "log_every": 3, "checkpoint_every": 100}
    train(with_options(**options, timestep_sampler="uniform"), edt, dataset, LocalContext(tmp_path / "a"))
    late = ["update 0", "update 1", "check 0", "update 2", "check 1", "check 2"]  # a row is due
    assert done == [*late, "update 3", "update 4", "check 3", "check 4"]
    done.clear()
    train(with_options(**options), edt, dataset, LocalContext(tmp_path / "b"))
    assert done == [f"{what} {step}" for step in range(5) for what in ("check", "update")]


CLIPPED = {"max_grad_norm": 0.5}
LATE = [(0, {}), (5, CLIPPED), (9, {})]  # before the first checkpoint, before another one, at the end


@pytest.mark.parametrize(
    ("step", "options"),
    suite_of(LATE, product((0, 4, 5, 7, 9), ({}, CLIPPED))),
)
def test_a_late_check_ends_as_one_at_once(
    step: int, options: dict[str, float], edt: ModelConfig, latents_artifact: Artifact, tmp_path: Path
) -> None:
    config = with_options(timestep_sampler="uniform", checkpoint_every=2, **options)
    late, prompt = LocalContext(tmp_path / "late"), LocalContext(tmp_path / "prompt")
    state = train(config, edt, spoiled(latents_artifact, step), late)
    with pytest.MonkeyPatch.context() as patch:
        at_once(patch)
        expected = train(config, edt, spoiled(latents_artifact, step), prompt)
    assert (state.step, state.skipped, state.rollbacks) == (10, {step}, 1)
    assert (expected.step, expected.skipped, expected.rollbacks) == (10, {step}, 1)
    assert late.warnings == prompt.warnings
    assert [row["step"] for row in late.reported] == [row["step"] for row in prompt.reported]
    assert state.history == expected.history
    assert late.store.steps() == prompt.store.steps()
    for number in late.store.steps():
        assert contents(place(tmp_path / "late", number)) == contents(place(tmp_path / "prompt", number))


def test_a_late_check_gives_up_as_one_at_once(edt: ModelConfig, latents_artifact: Artifact, tmp_path: Path) -> None:
    config = with_options(timestep_sampler="uniform", max_rollbacks=1)
    messages = []
    for folder in ("late", "prompt"):
        with pytest.MonkeyPatch.context() as patch:
            if folder == "prompt":
                at_once(patch)
            with pytest.raises(NotFiniteError, match="no rollback is left") as caught:
                train(config, edt, spoiled(latents_artifact, 5, 6), LocalContext(tmp_path / folder))
        messages.append((caught.value.step, str(caught.value)))
        assert LocalContext(tmp_path / folder).store.newest() == 4
    assert messages[0] == messages[1]


def test_no_checkpoint_holds_an_unchecked_step(
    edt: ModelConfig, latents_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one that a person asks for in the step after it either."""
    config = with_options(timestep_sampler="uniform", checkpoint_every=100, log_every=100)
    requests = iter([Request.NOTHING] * 4 + [Request.SAVE] * 100)
    context = LocalContext(tmp_path, request=lambda: next(requests))
    state = train(config, edt, spoiled(latents_artifact, 5), context)
    assert (state.step, state.skipped) == (10, {5})
    require_all_finite(state, tmp_path)


def test_a_training_goes_back_past_a_damaged_checkpoint(
    edt: ModelConfig, latents_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found at the worst time, and the training is none the worse."""
    poisoned = spoiled(latents_artifact, 9)
    train(CONFIG, edt, poisoned, LocalContext(tmp_path / "whole"))
    context = LocalContext(tmp_path / "damaged")
    latest = context.store.newest

    def damaging() -> int | None:
        context.store.flush()
        if context.store.steps() == [4, 8]:
            (place(tmp_path / "damaged", 8) / "ema.safetensors").write_bytes(b"damaged")
        return latest()

    monkeypatch.setattr(context.store, "newest", damaging)
    state = train(CONFIG, edt, poisoned, context)
    assert (state.step, state.skipped) == (10, {9})
    assert any("rolled back to step 4," in warning for warning in context.warnings)
    assert contents(place(tmp_path / "damaged", 10)) == contents(place(tmp_path / "whole", 10))


@pytest.mark.parametrize("value", suite_of([math.nan], [math.nan, -math.inf]))
def test_latents_that_are_not_finite_are_a_user_s_error(
    value: float, edt: ModelConfig, latents_artifact: Artifact, tmp_path: Path
) -> None:
    context = LocalContext(tmp_path)
    with pytest.raises(UserError, match=rf"1 latents of step 6 are not finite \(rows {row_of(6)}\)"):
        train(CONFIG, edt, spoiled(latents_artifact, 6, value=value), context)
    assert context.store.newest() == 4
    assert not [row for row in context.reported if "rollbacks" in row]


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_streamed_samples_are_named_by_their_keys(
    value: float, edt: ModelConfig, latents_artifact: Artifact, tmp_path: Path
) -> None:
    """Of one that is not a number and of one that is too large."""
    shards = []
    for path in latents_artifact.paths("*.arrow"):
        rows = [(key, label, posterior.copy()) for key, label, posterior in LatentShard(path)]
        for key, _, posterior in rows:
            if key == "1-7":
                posterior[:, 0] = value
        tar = tmp_path / f"{path.stem}.tar"
        write_latent_tar(tar, rows)
        shards.append(TarShard(Folder.at(tmp_path), tar.name, len(rows), sha256_file(tar)))
    stream = TarStream(tuple(shards), (4, 8, 8), LatentScale(0.5), shuffle_buffer=64)
    config = with_options(reader="webdataset", max_steps=12, max_rollbacks=0, checkpoint_every=100)
    context = LocalContext(tmp_path / "run")
    error = UserError if math.isnan(value) else NotFiniteError
    with pytest.raises(error, match="not finite") as caught:
        train(config, edt, stream, context)
    assert "keys 1-7" in (str(caught.value) if error is UserError else context.warnings[0])


# --- the disk


@pytest.mark.parametrize("failing", suite_of([3], [2, 3]))
def test_a_full_disk_ends_the_training_and_spoils_nothing(
    failing: int, edt: ModelConfig, dataset: LatentDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint too: a training whose end was not kept has not ended well."""
    train(CONFIG, edt, dataset, LocalContext(tmp_path / "whole"))
    save, weights = tensor_files.save_file, []

    def full(tensors: dict[str, torch.Tensor], path: Path, *_: object) -> None:
        if path.name == "ema.safetensors":
            weights.append(path)
        if len(weights) == failing:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(UserError, match=r"No space left|no space"):
        train(CONFIG, edt, dataset, LocalContext(tmp_path / "full"))
    monkeypatch.undo()
    monkeypatch.setattr(loop, "matmul_rate", lambda *_: 1e9)
    before = 4 * (failing - 1)
    assert contents(place(tmp_path / "full", before)) == contents(place(tmp_path / "whole", before))
    context = LocalContext(tmp_path / "full")
    assert context.store.newest() == before
    train(CONFIG, edt, dataset, context)
    assert contents(place(tmp_path / "full", 10)) == contents(place(tmp_path / "whole", 10))


def test_a_reader_that_fails_ends_the_training_when_its_last_checkpoint_is_written(
    edt: ModelConfig, latents_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever hears of the error may start again in the same folder at once: nothing writes there any more."""

    class Failing(LatentDataset):
        def gather(self, indices, mirror, out=None):
            if row_of(6) in indices:
                raise OSError("the disk is gone")
            return super().gather(indices, mirror, out)

    save = tensor_files.save_file

    def slowly(tensors: dict[str, torch.Tensor], path: Path, *_: object) -> None:
        time.sleep(0.2)
        save(tensors, path)

    monkeypatch.setattr(tensor_files, "save_file", slowly)
    context = LocalContext(tmp_path)
    with pytest.raises(OSError, match="the disk is gone"):
        train(CONFIG, edt, Failing(latents_artifact.paths("*.arrow")), context)
    written = (place(tmp_path, 4) / "checkpoint.json").exists()
    context.store.flush()
    assert context.store.newest() == 4
    assert written, "the error was raised while the checkpoint of step 4 was still being written"


# --- killed


def _in_a_process(work: Callable[[], None], patience_s: float | None = None) -> int:
    """Run `work` in a fork of this process, killed when its time is up; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"failed: {error!r}", flush=True)
            os._exit(1)
    if patience_s is not None:
        time.sleep(patience_s)
        os.kill(child, signal.SIGKILL)  # one that has ended waits to be waited for
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _killing_itself(after: int | None) -> None:
    """Have this process killed at the `after`-th time that it syncs a file to the disk or removes one.

    None: when it has removed the first file of a checkpoint, and not the others.
    """
    done: list[None] = []

    def counted(original: Callable[..., None]) -> Callable[..., None]:
        def counting(*inputs: object) -> None:
            done.append(None)
            if len(done) == (after or 2):
                os.kill(os.getpid(), signal.SIGKILL)
            original(*inputs)

        return counting

    if after is not None:
        storage.fsync_file = counted(storage.fsync_file)
    Folder.remove = counted(Folder.remove)  # type: ignore[method-assign]


def _train_and_be_killed(folder: Path, paths: list[Path], kills: int, seed: int) -> None:
    """An uninterrupted training, and one that is killed again and again before it may end. No thread runs here."""
    torch.set_num_threads(1)
    loop.matmul_rate = lambda *_: 1e9  # type: ignore[assignment]
    dataset, rng = LatentDataset(paths), random.Random(seed)

    def work(name: str, *after: int | None) -> None:
        if after:
            _killing_itself(*after)
        context = LocalContext(folder / name, num_to_keep=2)
        train(KILLED, narrow(), dataset, context)
        context.store.prune(at_end=True)

    began = time.monotonic()
    assert _in_a_process(lambda: work("whole")) == 0
    seconds = time.monotonic() - began
    statuses = []
    # A checkpoint has 28 such places, and some more where others are removed.
    places = [40, None] if kills == 2 else [rng.randrange(1, 70) for _ in range(kills)]
    for after in places:
        statuses.append(_in_a_process(lambda after=after: work("killed", after)))
    if kills > 2:
        statuses.append(_in_a_process(lambda: work("killed"), patience_s=rng.uniform(0.1, 0.4) * seconds))
    assert _in_a_process(lambda: work("killed")) == 0
    print(json.dumps(statuses))


@pytest.mark.faults
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("kills", suite_of([2], [2, 8]))
def test_a_training_that_is_killed_while_it_writes_ends_as_if_it_had_not_been(
    kills: int, latents_artifact: Artifact, tmp_path: Path
) -> None:
    paths = [str(path) for path in latents_artifact.paths("*.arrow")]
    (printed,) = run_forked("tests.edt_core.test_training_faults", [[str(tmp_path), str(kills), *paths]])
    statuses = json.loads(printed.splitlines()[-1])
    assert set(statuses) <= {0, -signal.SIGKILL}
    assert statuses[:kills].count(-signal.SIGKILL) >= (2 if kills == 2 else kills // 2), statuses
    whole, killed = (
        {path.name for path in (tmp_path / name / "checkpoints").iterdir()} for name in ("whole", "killed")
    )
    assert whole == killed
    assert len(whole) in (2, 3)
    for name in whole:
        folders = [contents(tmp_path / run / "checkpoints" / name) for run in ("whole", "killed")]
        assert folders[0] == folders[1]
    assert {path.name for path in (tmp_path / "killed" / ".journal").glob("*.json")} == {
        path.name for path in (tmp_path / "whole" / ".journal").glob("*.json")
    }


if __name__ == "__main__":
    _train_and_be_killed(Path(sys.argv[1]), [Path(path) for path in sys.argv[3:]], int(sys.argv[2]), seed=0)

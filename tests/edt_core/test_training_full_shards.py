"""Trainings with `train.shard: full` among two and three processes, against DDP: numbers, files, resumes, faults.

Run as a module, this file is one of the processes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from edt_core.config import TrainConfig, result_fields
from edt_core.data.latents import LatentDataset
from edt_core.models import model_config, shadow
from edt_core.store.artifact import Artifact
from edt_core.training import loop, trainer
from edt_core.training.context import LocalContext
from edt_core.training.estimate import estimate
from edt_core.training.loop import train
from edt_core.training.optim import gradient_norm
from edt_core.training.ranks import Ranks
from edt_core.training.shard import files
from edt_core.training.shard.rows import Rows, gathered_bytes, row_share
from edt_core.training.speed.compiled import failure
from edt_core.training.state import TrainState
from tests.support.gloo import join, run_ranks
from tests.support.holdouts import some_held_out
from tests.support.local_training import checkpoint_steps
from tests.support.local_training import contents as all_files
from tests.support.trainings import cut_back, narrow, plain_update

HALF, LAST = 2, 4
CONFIG = TrainConfig(
    global_batch_size=8,
    micro_batch_size=2,
    max_steps=LAST,
    checkpoint_every=HALF,
    keep_every=HALF,
    log_every=1,
    lr=1e-3,
    num_workers=2,
    masked_loss=False,
)
CASES: dict[str, dict[str, Any]] = {
    "adan": {
        "max_grad_norm": 0.5,
        "masked_loss": True,
        "ema_decay": (0.9, 0.99),
        "ema_widths": (0.05,),
        "ema_snapshots": 2,
        "preview_every": 4,
        "validate_every": 2,
        "holdout": 0.2,
        "weight_decay": 0.1,
    },
    "adamw": {
        "optimizer": "adamw",
        "gradient_dtype": "bf16",
        "precision": "bf16",
        "activation_checkpointing": True,
        "micro_batch_size": 4,
    },
    "compiled": {"compile": True, "align": "autoencoder"},
}
WEIGHTS = 2e-6  # largest difference of a weight from DDP's, whose steps are about 1e-3; about 1e-7 here
LOSSES = 1e-6  # relative


def configured(case: str, mode: str) -> TrainConfig:
    return CONFIG.model_copy(update={**CASES[case], "shard": mode})


class Seeing(LocalContext):
    """A context that adds up the weights that it is given for a preview."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sums: list[float] = []

    def preview(self, weights: Mapping[str, Tensor], step: int) -> None:
        self.sums.append(float(torch.stack([value.double().sum() for value in weights.values()]).sum()))


def run(case: str, mode: str, folder: Path, paths: list[str], ranks: Ranks) -> dict[str, Any]:
    """A training; what of it is not in its files: rows, previews, bytes of this rank's state."""
    config, context = configured(case, mode), Seeing(folder, ranks)
    holdout = some_held_out() if config.holdout_share else None
    state = train(config, narrow(), LatentDataset([Path(path) for path in paths]), context, None, holdout)
    return {"rows": state.history.rows, "previews": context.sums, **bytes_of(state)}


def bytes_of(state: TrainState) -> dict[str, Any]:
    states = [value for values in state.optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    return {
        "weights": sum(value.nbytes for value in state.own().values()),
        "optimizer": sum(value.nbytes for value in states if value.ndim),
        "ema": sum(value.nbytes for average in state.ema.averages for value in average.values()),
    }


def _work(ranks: Ranks, folder: Path, paths: list[str]) -> None:
    """The trainings of one of two processes."""
    loop.compile_parts = lambda *_, **__: None
    loop.CompiledUpdate = plain_update  # type: ignore[assignment,misc]
    found = {
        f"{case} {mode}": run(case, mode, folder / f"{case} {mode}", paths, ranks)
        for case in CASES
        for mode in ("none", "full")
    }
    for before, mode in (("none", "full"), ("full", "optimizer"), ("full", "full")):
        if ranks.rank == 1 and before == mode:
            files.is_visible = lambda _path: False  # type: ignore[assignment]
        _resume(ranks, folder / f"adan {before}", folder / f"{before} to {mode}")
        run("adan", mode, folder / f"{before} to {mode}", paths, ranks)
    for mode in ("none", "full"):
        trainer.gradient_norm = partial(_not_finite, [])
        found[f"back {mode}"] = run("compiled", mode, folder / f"back {mode}", paths, ranks)["rows"]
    trainer.gradient_norm = gradient_norm
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
    _resume(ranks, folder / "adamw full", folder / "killed")
    if ranks.rank == 1:
        files.write_at = lambda *_: os._exit(0)  # type: ignore[assignment]
        files.is_visible = Path.exists
    try:
        run("adamw", "full", folder / "killed", paths, ranks)
    except Exception as error:
        (folder / "killed.txt").write_text(str(error))
    os._exit(0)  # without the other process


def _three(ranks: Ranks, folder: Path, paths: list[str]) -> None:
    """The trainings of one of three processes, which continue those of one and two."""
    for name in ("two to three", "one to three"):
        run("adan", "full", folder / name, paths, ranks)


def _not_finite(calls: list[int], parameters: Any) -> Tensor:
    """The norm of a gradient, but for the first one, and one after a checkpoint."""
    calls.append(len(calls))
    norm = gradient_norm(parameters)
    return norm * torch.nan if len(calls) in (1, 4) else norm


def _resume(ranks: Ranks, before: Path, folder: Path) -> None:
    if ranks.rank == 0:
        cut_back(before, folder, HALF)
    dist.barrier()


@pytest.fixture(scope="module")
def paths(latents_artifact: Artifact) -> list[str]:
    return [str(path) for path in latents_artifact.paths("*.arrow")]


@pytest.fixture(scope="module")
def processes(forks: None, paths: list[str], one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "matmul_rate", lambda *_: 1e9)
        run("adan", "full", folder / "alone", paths, Ranks())
        run_ranks(__name__, 2, folder, *paths)
        cut_back(folder / "adan full", folder / "two to one", HALF)
        run("adan", "full", folder / "two to one", paths, Ranks())
    return folder


def found(folder: Path, rank: int) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / f"{rank}.json").read_text())
    return results


def difference(first: Path, second: Path) -> float:
    """The largest difference of a weight or an average between the last checkpoints of two trainings."""
    folders = [folder / "checkpoints" / f"step-{LAST:08d}" for folder in (first, second)]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    largest = 0.0
    for name in ("model.safetensors", *(name for name in names[0] if name.startswith("ema"))):
        left, right = (load_file(folder / name) for folder in folders)
        assert {key: (value.shape, value.dtype) for key, value in left.items()} == {
            key: (value.shape, value.dtype) for key, value in right.items()
        }
        largest = max(largest, *(float((left[key] - right[key]).abs().max()) for key in left))
    return largest


@pytest.mark.extern
@pytest.mark.parametrize("case", CASES)
def test_rows_train_what_whole_tensors_train(processes: Path, case: str) -> None:
    """Up to the order of sums: losses, held-out losses, weights, averages, previews. Every file has the same names."""
    first, second = (found(processes, rank)[f"{case} full"] for rank in range(2))
    plain = found(processes, 0)[f"{case} none"]
    assert [row.keys() for row in first["rows"]] == [row.keys() for row in plain["rows"]]
    for mine, ddp in zip(first["rows"], plain["rows"], strict=True):
        assert mine == pytest.approx(ddp, rel=LOSSES, abs=LOSSES)
    assert first["rows"] == second["rows"]
    assert first["previews"] == pytest.approx(plain["previews"], abs=1e-2)
    assert len(first["previews"]) == int(case == "adan")
    assert difference(processes / f"{case} full", processes / f"{case} none") < WEIGHTS
    names = [sorted(all_files(processes / f"{case} {mode}")) for mode in ("none", "full")]
    assert names[0] == names[1]


@pytest.mark.extern
@pytest.mark.parametrize("case", CASES)
def test_each_process_has_about_half_of_weights_optimizer_and_averages(processes: Path, case: str) -> None:
    halves = [found(processes, rank)[f"{case} full"] for rank in range(2)]
    whole = found(processes, 0)[f"{case} none"]
    for name in ("weights", "optimizer", "ema"):
        assert whole[name] <= sum(half[name] for half in halves) < 1.02 * whole[name]  # buffers are not divided
        assert max(half[name] for half in halves) < 0.6 * whole[name]
    if case != "compiled":  # the head is not in the estimate of the share
        needs = estimate(configured(case, "full"), narrow(), 100)
        measured = max(half["optimizer"] for half in halves), max(half["ema"] for half in halves)
        assert (needs.optimizer, needs.ema) == pytest.approx(measured, rel=0.03)


@pytest.mark.extern
def test_a_resumed_training_has_the_same_bits(processes: Path) -> None:
    """Also if one of its ranks does not see the files, and sends its rows."""
    assert all_files(processes / "full to full") == all_files(processes / "adan full")


@pytest.mark.extern
@pytest.mark.parametrize("name", ["none to full", "full to optimizer", "two to one"])
def test_a_training_resumes_in_any_mode_and_number_of_processes(processes: Path, name: str) -> None:
    assert checkpoint_steps(processes / name) == {HALF, LAST}
    assert difference(processes / name, processes / "adan none") < WEIGHTS


@pytest.mark.extern
@pytest.mark.slow
def test_three_processes_resume_from_one_and_from_two(processes: Path, paths: list[str], tmp_path: Path) -> None:
    """Their rows are of uneven numbers, and some processes have none of a tensor."""
    cut_back(processes / "adan full", tmp_path / "two to three", HALF)
    cut_back(processes / "alone", tmp_path / "one to three", HALF)
    run_ranks(__name__, 3, tmp_path, *paths)
    for name in ("two to three", "one to three"):
        assert checkpoint_steps(tmp_path / name) == {HALF, LAST}
        assert difference(tmp_path / name, processes / "adan none") < WEIGHTS


@pytest.mark.extern
def test_going_back_after_a_step_that_is_not_finite(processes: Path) -> None:
    first, second = (found(processes, rank) for rank in range(2))
    assert first["back full"] == second["back full"]
    assert [row["step"] for row in first["back full"]] == [row["step"] for row in first["back none"]]
    assert difference(processes / "back full", processes / "back none") < WEIGHTS
    assert difference(processes / "back full", processes / "compiled full") > WEIGHTS


@pytest.mark.extern
@pytest.mark.usefixtures("quickly", "one_thread")
def test_a_checkpoint_is_not_whole_if_one_of_its_writers_died(processes: Path, paths: list[str]) -> None:
    assert (processes / "killed.txt").read_text(), "the other process noticed"
    assert checkpoint_steps(processes / "killed") == {HALF}
    run("adamw", "none", processes / "killed", paths, Ranks())
    assert difference(processes / "killed", processes / "adamw none") < 1e-4  # one process does not round to bf16


def test_the_mode_is_not_part_of_a_fingerprint() -> None:
    assert result_fields(configured("adan", "full")) == result_fields(configured("adan", "none"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "muon"}, "optimizer is muon"),
        ({"align": "self", "align_target_block": 2}, "align is self"),
        ({"trainable": "bias"}, "trainable is bias"),
        ({"compile": "reduce-overhead"}, "compile is reduce-overhead"),
        ({"micro_batch_size": 1, "num_workers": 2, "global_batch_size": 7}, "7 samples"),
    ],
)
def test_what_needs_whole_tensors_is_refused(fields: dict[str, Any], message: str) -> None:
    TrainConfig.model_validate(fields)
    with pytest.raises(ValueError, match=f"shard is full, but .*{message}.* set .*, or shard=optimizer"):
        TrainConfig.model_validate({**fields, "shard": "full"})


def test_a_compiler_that_fails_ends_a_training_whose_ranks_wait_for_each_other() -> None:
    def fail() -> None:
        raise RuntimeError("no compiler")

    assert failure(fail, Ranks()) == "RuntimeError: no compiler"
    with pytest.raises(ValueError, match=r"no compiler.*train\.compile=false"):
        failure(fail, Ranks(), stop=True)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_rows_are_those_of_chunk(ranks: int) -> None:
    for length in (1, 2, 3, 8, 9, 16):
        whole = torch.arange(length * 2).view(length, 2)
        chunks = whole.chunk(ranks)
        for rank in range(ranks):
            own = Rows.of(tuple(whole.shape), rank, ranks).cut(whole)
            assert torch.equal(own, chunks[rank]) if rank < len(chunks) else len(own) == 0


def test_the_estimate_divides_everything_but_what_is_gathered() -> None:
    model = model_config("EDT-Tiny/2", 32, 4)
    config = TrainConfig(num_workers=8, micro_batch_size=1, use_gpu=True)
    none, full = (estimate(config.model_copy(update={"shard": mode}), model, 1) for mode in ("none", "full"))
    part = row_share(model, 8)
    assert 0.125 <= part < 0.13
    assert full.state == pytest.approx(part * none.state, rel=1e-6)
    assert full.activations == none.activations
    assert full.temporary >= gathered_bytes(model)
    large = model_config("EDT-XL/2", 256, 1000)
    assert gathered_bytes(large) < 0.4 * 4 * sum(value.numel() for value in shadow(large).parameters())


if __name__ == "__main__":
    own_rank, world, own_folder, own_paths = join(sys.argv[1:])
    (_work if world == 2 else _three)(Ranks(own_rank, world), own_folder, own_paths)

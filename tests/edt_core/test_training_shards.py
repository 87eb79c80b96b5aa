"""Trainings whose optimizer's state and averages are divided among two processes: bits, files, faults.

Run as a module, this file is one of the processes.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
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
from edt_core.training.shard.cards import card_rows
from edt_core.training.shard.files import Described, Layout, write_at
from edt_core.training.shard.owners import owners_of
from edt_core.training.speed.update import by_block
from edt_core.training.state import initial_state, to_checkpoint
from tests.support.gloo import join, run_ranks
from tests.support.holdouts import some_held_out
from tests.support.local_training import checkpoint_steps
from tests.support.local_training import contents as all_files
from tests.support.trainings import cut_back, narrow, plain_update

HALF, LAST = 2, 4
CONFIG = TrainConfig(
    global_batch_size=8,
    micro_batch_size=4,  # of both processes, and of one
    max_steps=LAST,
    checkpoint_every=HALF,
    keep_every=HALF,
    log_every=1,
    lr=1e-3,
    num_workers=2,
    masked_loss=False,
)
MODES = ("none", "optimizer")
CASES: dict[str, dict[str, Any]] = {
    "adan": {
        "max_grad_norm": 0.5,
        "masked_loss": True,
        "ema_decay": (0.9, 0.99),
        "ema_widths": (0.05, 0.1),
        "ema_snapshots": 2,
        "preview_every": 2,
        "validate_every": 2,
        "holdout": 0.2,
        "weight_decay": 0.1,
    },
    "muon": {"optimizer": "muon", "align": "autoencoder"},
    "adamw": {
        "optimizer": "adamw",
        "gradient_dtype": "bf16",
        "weight_decay": 0.1,
        "trainable": "difffit",
        "preview_every": 4,
        "align": "self",
        "align_block": 1,
        "align_target_block": 2,
    },
    "compiled": {"compile": "reduce-overhead"},  # and masked
}
RESUMED = (("adan", "none", "optimizer"), ("adan", "optimizer", "none"), ("muon", *MODES), ("adamw", *MODES[::-1]))


def configured(case: str, mode: str = "none") -> TrainConfig:
    return CONFIG.model_copy(update={**CASES[case], "shard": mode})


@dataclass
class Seeing(LocalContext):
    """A context that keeps the weights that it is given for a preview, and the bytes that this rank held."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[dict[str, Tensor]] = []

    def preview(self, weights: Mapping[str, Tensor], step: int) -> None:
        self.seen.append({name: value.clone() for name, value in weights.items()})


def run(case: str, mode: str, folder: Path, paths: list[str], ranks: Ranks) -> dict[str, Any]:
    """A training; what of it is not in its files: rows, sums of the previews' weights, bytes of the state."""
    config, context = configured(case, mode), Seeing(folder, ranks)
    whole = initial_state(config, narrow())
    initial = (lambda: to_checkpoint(whole, config, 0, whole=True)) if config.trainable != "all" else None
    holdout = some_held_out() if config.holdout_share else None
    state = train(config, narrow(), LatentDataset([Path(path) for path in paths]), context, initial, holdout)
    tensors = [
        value for values in state.optimizer.state.values() for value in values.values() if torch.is_tensor(value)
    ]
    return {
        "rows": state.history.rows,
        "previews": [sum(float(value.double().sum()) for value in weights.values()) for weights in context.seen],
        "optimizer": sum(value.nbytes for value in tensors),
        "averages": [sum(value.nbytes for value in average.values()) for average in state.ema.averages],
    }


def _work(rank: int, world_size: int, folder: Path, paths: list[str]) -> None:
    """The trainings of one process."""
    ranks = Ranks(rank, world_size)
    loop.compile_parts = lambda *_, **__: None
    loop.CompiledUpdate = plain_update  # type: ignore[assignment,misc]
    found = {
        f"{case} {mode}": run(case, mode, folder / f"{case} {mode}", paths, ranks) for case in CASES for mode in MODES
    }
    for case, before, mode in RESUMED:
        _resume(ranks, folder / f"{case} {before}", folder / f"{case} {before} to {mode}")
        run(case, mode, folder / f"{case} {before} to {mode}", paths, ranks)
    for mode in MODES:
        trainer.gradient_norm = partial(_not_finite, calls := [])
        found[f"back {mode}"] = run("compiled", mode, folder / f"back {mode}", paths, ranks)["rows"]
        found[f"norms {mode}"] = len(calls)
    trainer.gradient_norm = gradient_norm
    _resume(ranks, folder / "alone", folder / "alone to optimizer")
    run("adan", "optimizer", folder / "alone to optimizer", paths, ranks)
    if rank == 1:
        files.is_visible = lambda _path: False  # type: ignore[assignment]
    _resume(ranks, folder / "adan optimizer", folder / "apart")
    run("adan", "optimizer", folder / "apart", paths, ranks)
    _resume(ranks, folder / "adan optimizer", folder / "full")
    if rank == 1:
        files.is_visible, files.write_at = Path.exists, _disk_is_full
    found["full"] = _failure(run, "adan", "optimizer", folder / "full", paths, ranks)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    _resume(ranks, folder / "adan optimizer", folder / "killed")
    if rank == 1:
        files.write_at = lambda *_: os._exit(0)  # type: ignore[assignment]
    killed = _failure(run, "adan", "optimizer", folder / "killed", paths, ranks)
    (folder / "killed.json").write_text(json.dumps(killed))
    os._exit(0)  # without the other process


def _not_finite(calls: list[int], parameters: Any) -> Tensor:
    """The norm of a gradient, but for the first one, and one after a checkpoint."""
    calls.append(len(calls))
    norm = gradient_norm(parameters)
    return norm * torch.nan if len(calls) in (1, 4) else norm


def _resume(ranks: Ranks, before: Path, folder: Path) -> None:
    if ranks.rank == 0:
        cut_back(before, folder, HALF)
    dist.barrier()


def _disk_is_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "no space")


def _failure(work: Any, *arguments: Any) -> str:
    try:
        work(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.fixture(scope="module")
def paths(latents_artifact: Artifact) -> list[str]:
    return [str(path) for path in latents_artifact.paths("*.arrow")]


@pytest.fixture(scope="module")
def processes(forks: None, paths: list[str], one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "matmul_rate", lambda *_: 1e9)
        run("adan", "optimizer", folder / "alone", paths, Ranks())
    run_ranks(__name__, 2, folder, *paths)
    return folder


def found(folder: Path, rank: int) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / f"{rank}.json").read_text())
    return results


@pytest.mark.extern
@pytest.mark.parametrize("case", CASES)
def test_a_divided_state_trains_the_same_bits_and_files(processes: Path, case: str) -> None:
    plain, divided = (all_files(processes / f"{case} {mode}") for mode in MODES)
    assert divided == plain
    assert checkpoint_steps(processes / f"{case} none") == {HALF, LAST}
    first, second = (found(processes, rank) for rank in range(2))
    for key in ("rows", "previews"):
        assert first[f"{case} optimizer"][key] == first[f"{case} none"][key]
    assert second[f"{case} optimizer"]["rows"] == first[f"{case} none"]["rows"]
    assert len(first[f"{case} none"]["previews"]) == {"adan": 2, "adamw": 1}.get(case, 0)


@pytest.mark.extern
@pytest.mark.parametrize("case", CASES)
def test_each_process_has_about_half_of_the_state(processes: Path, case: str) -> None:
    halves = [found(processes, rank)[f"{case} optimizer"] for rank in range(2)]
    whole = found(processes, 0)[f"{case} none"]
    assert sum(half["optimizer"] for half in halves) == whole["optimizer"]
    assert max(half["optimizer"] for half in halves) < 0.65 * whole["optimizer"]
    for place, average in enumerate(whole["averages"]):
        parts = [half["averages"][place] for half in halves]
        if place == 0 and CASES[case].get("align") == "self":  # the target, as a model, of each process
            assert parts == [average, average]
        else:
            assert sum(parts) == average
            assert max(parts) < 0.65 * average
    needs = estimate(configured(case, "optimizer"), narrow(), 100)
    if CASES[case].get("align") is None:  # the head is not in the estimate of the shares
        assert needs.optimizer == pytest.approx(max(half["optimizer"] for half in halves), rel=0.02)
        assert needs.ema == pytest.approx(max(sum(half["averages"]) for half in halves), rel=0.02)


@pytest.mark.extern
@pytest.mark.parametrize(("case", "before", "mode"), RESUMED)
def test_a_training_resumes_in_the_other_mode_with_the_same_bits(
    processes: Path, case: str, before: str, mode: str
) -> None:
    assert all_files(processes / f"{case} {before} to {mode}") == all_files(processes / f"{case} none")


@pytest.mark.extern
@pytest.mark.usefixtures("quickly", "one_thread")
def test_a_training_resumes_with_another_number_of_processes(processes: Path, paths: list[str]) -> None:
    """One process after two, and two after one; and after a process died while both wrote the last checkpoint."""
    whole = all_files(processes / "adan none")
    assert all_files(processes / "alone") == whole
    assert all_files(processes / "alone to optimizer") == whole
    cut_back(processes / "adan optimizer", processes / "two to one", HALF)
    run("adan", "none", processes / "two to one", paths, Ranks())
    assert all_files(processes / "two to one") == whole


@pytest.mark.extern
@pytest.mark.usefixtures("quickly", "one_thread")
def test_a_checkpoint_is_not_whole_if_one_of_its_writers_died(processes: Path, paths: list[str]) -> None:
    assert json.loads((processes / "killed.json").read_text()), "the other process noticed"
    assert checkpoint_steps(processes / "killed") == {HALF}
    run("adan", "optimizer", processes / "killed", paths, Ranks())
    assert {name: data for name, data in all_files(processes / "killed").items() if "/.staging" not in name} == (
        all_files(processes / "adan none")
    )


@pytest.mark.extern
def test_going_back_to_the_start_and_to_a_checkpoint_is_the_same_in_both_modes(processes: Path) -> None:
    """A masked update leaves the step out on the device; then all ranks return to what they had."""
    assert all_files(processes / "back optimizer") == all_files(processes / "back none")
    assert all_files(processes / "back none") != all_files(processes / "compiled none")
    for rank in range(2):
        results = found(processes, rank)
        assert results["back optimizer"] == results["back none"]
        assert results["norms optimizer"] == results["norms none"] > LAST


@pytest.mark.extern
def test_a_rank_that_does_not_see_the_file_sends_its_part(processes: Path) -> None:
    assert all_files(processes / "apart") == all_files(processes / "adan none")


@pytest.mark.extern
def test_a_full_disk_of_one_rank_is_an_error_of_all(processes: Path) -> None:
    first, second = (found(processes, rank)["full"] for rank in range(2))
    assert "no space" in second
    assert first
    assert checkpoint_steps(processes / "full") == {HALF}


@pytest.mark.extern
@pytest.mark.slow
def test_three_processes_take_over_from_two(processes: Path, paths: list[str], tmp_path: Path) -> None:
    cut_back(processes / "adan optimizer", tmp_path / "adan none", HALF)
    cut_back(processes / "adan none", tmp_path / "adan optimizer", HALF)
    run_ranks(__name__, 3, tmp_path, *paths)
    assert all_files(tmp_path / "adan none") == all_files(tmp_path / "adan optimizer")
    assert checkpoint_steps(tmp_path / "adan none") == {HALF, LAST}


def test_the_mode_is_not_part_of_a_fingerprint() -> None:
    assert result_fields(configured("adan", "optimizer")) == result_fields(configured("adan"))


def test_a_dry_run_for_gpus_shows_what_fits_in_each_mode() -> None:
    model = model_config("EDT-Tiny/2", 32, 4)
    config = CONFIG.model_copy(update={"use_gpu": True, "num_workers": 8, "global_batch_size": 1_000_000})
    rows = dict(re.findall(r"\n  (.{25}) (.+)", card_rows(config, model)))
    assert [name.strip() for name in rows] == ["state per worker", "fits on 24 GB", "fits on 40 GB", "fits on 80 GB"]
    for card in (24, 40, 80):
        texts = re.split("; with shard (?:optimizer|full) ", rows[f"fits on {card} GB".ljust(25)])
        alone, divided, full = map(_number, texts)
        assert alone < divided < full
        for mode, samples in zip((*MODES, "full"), (alone, divided, full), strict=True):
            both = [config.model_copy(update={"shard": mode, "micro_batch_size": samples + more}) for more in (0, 1)]
            fits, exceeds = (estimate(each, model, 1).memory for each in both)
            assert fits <= 0.8 * (card << 30) < exceeds
    assert "with shard" not in card_rows(config.model_copy(update={"num_workers": 1}), model)
    assert "shard full" not in card_rows(config.model_copy(update={"optimizer": "muon"}), model)
    assert not card_rows(config.model_copy(update={"use_gpu": False}), model)


def _number(text: str) -> int:
    return int(text.removeprefix("micro-batch ").replace(",", ""))


@pytest.mark.parametrize(("name", "ranks"), [("EDT-S/2", 2), ("EDT-XL/2", 8), ("DiT-S/2", 4), ("EDT-Tiny/2", 64)])
def test_blocks_stay_together_and_shares_are_even(name: str, ranks: int) -> None:
    sizes = {key: value.numel() for key, value in shadow(model_config(name, 256, 10)).state_dict().items()}
    owners = owners_of(sizes, ranks)
    assert owners.keys() == sizes.keys()
    blocks = {key: members for key, members in by_block(sizes).items() if key}
    assert all(len({owners[member] for member in members}) == 1 for members in blocks.values())
    loads = [sum(sizes[key] for key in sizes if owners[key] == rank) for rank in range(ranks)]
    largest = max(sum(sizes[member] for member in members) for members in blocks.values())
    assert max(loads) <= max(largest, 1.1 * sum(loads) / ranks)
    assert loads[0] > 0, "the groups in a checkpoint are those of rank 0"


@pytest.mark.parametrize("metadata", [None, {"average": '{"step": 1, "width": 0.05}'}])
def test_a_file_written_in_parts_has_the_bytes_of_the_library(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    values = [torch.arange(5).to(dtype) for dtype in files._DTYPES]
    tensors = {f"{'bca'[place % 3]}.{place}": value for place, value in enumerate(values)}
    tensors |= {"scalar": torch.tensor(0.5), "empty": torch.zeros(0, 3), "matrix": torch.randn(4, 3).T.contiguous()}
    for few in (tensors, {}):
        save_file(few, tmp_path / "library", metadata)
        layout = Layout.of([Described.of(name, value) for name, value in few.items()], metadata)
        with (tmp_path / "ours").open("wb") as file:
            file.write(layout.header)
            file.truncate(layout.size)
            for name, value in reversed(few.items()):
                write_at(file, layout.places[name], value)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "library").read_bytes()


if __name__ == "__main__":
    own_rank, world, own_folder, own_paths = join(sys.argv[1:])
    if world == 2:
        _work(own_rank, world, own_folder, own_paths)
    else:
        for own_mode in MODES:
            run("adan", own_mode, own_folder / f"adan {own_mode}", own_paths, Ranks(own_rank, world))

"""Two processes on the CPU train what one would: compiled blocks, padded projections, Muon, a head, and a fine-tuning.

Run as a module, this file is one of the processes.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from edt_core.config import ChainConfig, DistillConfig, TrainConfig
from edt_core.data.latents import LatentDataset
from edt_core.models import attention
from edt_core.store.artifact import Artifact
from edt_core.training import loop
from edt_core.training import step as training_step
from edt_core.training.checkpoint import Checkpoint, load_checkpoint
from edt_core.training.context import LocalContext
from edt_core.training.loop import ReadInitial, train
from edt_core.training.ranks import Ranks
from edt_core.training.speed import compiled
from edt_core.training.speed.update import CompiledUpdate
from edt_core.training.start.initial import initial_checkpoint
from tests.edt_core.test_training_start import NAMES, base_of
from tests.support.gloo import join, run_ranks
from tests.support.models import shallow_config
from tests.support.trainings import contents, cut_back, narrow, place, plain_update

CONFIG = TrainConfig(
    global_batch_size=8, max_steps=4, checkpoint_every=4, log_every=1, max_grad_norm=1.0, lr=1e-3, num_workers=2
)
BOUND = 1e-4  # of a loss, relative: float32, in another order within a graph, through four steps of Adan
PADDED = CONFIG.model_copy(
    update={"micro_batch_size": 2, "activation_checkpointing": True, "ema_widths": (0.05, 0.1), "ema_snapshots": 2}
)
MUON = CONFIG.model_copy(update={"optimizer": "muon", "checkpoint_every": 2})
ALIGNED = CONFIG.model_copy(update={"align": "self", "max_grad_norm": None})
FINE_TUNED = CONFIG.model_copy(update={"init_from": "base", "trainable": "difffit", "lr": 1e-2})
GUIDED = ChainConfig(sampler="ddim", num_sampling_steps=8, cfg_scale=2.0)
DISTILLED = CONFIG.model_copy(
    update={
        "masked_loss": False,
        "min_snr_gamma": None,
        "timestep_sampler": "uniform",
        "checkpoint_every": 2,
        "init_from": "base",
        "distill": DistillConfig(steps=4, teacher=GUIDED),
        "num_workers": 2,
    }
)
PRUNED = CONFIG.model_copy(
    update={
        "model": "DiT-Tiny/2",
        "masked_loss": False,
        "checkpoint_every": 3,
        "init_from": "base",
        "prune": (1, 3),
        "shard": "optimizer",
    }
)
PLAIN = CONFIG.model_copy(  # the blocks of a DiT take the fewest graphs
    update={"model": "DiT-Tiny/2", "masked_loss": False, "micro_batch_size": 2, "activation_checkpointing": True}
)


def _work(rank: int, folder: Path, backend: str, paths: list[Path]) -> None:
    """The trainings of one process. Each leaves its losses and its warnings."""
    loop.compile_parts = partial(compiled.compile_parts, backend=backend)  # type: ignore[assignment]
    of_update = plain_update if backend == "aot_eager" else partial(CompiledUpdate, backend=backend)
    loop.CompiledUpdate = of_update  # type: ignore[assignment,misc]

    def run(name: str, config: TrainConfig, initial: ReadInitial | None = None) -> None:
        context = LocalContext(folder / name, Ranks(rank, 2))
        model = narrow() if config.masked_loss or config.distill else shallow_config(config.model)
        state = train(config, model, LatentDataset(paths), context, initial)
        found = {"losses": [row["loss"] for row in state.history.rows], "warnings": context.warnings}
        found["head"] = [float(value.detach().double().sum()) for value in state.heads().values()]
        found["weights"] = [float(value.detach().double().sum()) for value in state.model.parameters()]
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))

    run("aligned", ALIGNED)
    run("fine-tuned", FINE_TUNED, read_base)
    run("muon", MUON)
    run("distilled", DISTILLED, read_teacher)
    run("pruned", PRUNED, read_uncut)
    if rank == 0:
        cut_back(folder / "muon", folder / "muon again", MUON.checkpoint_every)
        cut_back(folder / "distilled", folder / "distilled again", DISTILLED.checkpoint_every)
        cut_back(folder / "pruned", folder / "pruned again", PRUNED.checkpoint_every)
    dist.barrier()
    run("muon again", MUON)
    run("distilled again", DISTILLED, read_teacher)
    run("pruned again", PRUNED, read_uncut)
    for value in (False, True):
        run(f"compile {value}", PLAIN.model_copy(update={"compile": value}))
    attention.head_padding = lambda head_dim, device: 4 if device.type == "cpu" else 0  # not where costs are counted
    run("shared", PADDED)
    training_step.shared_projections = lambda _model: nullcontext()  # type: ignore[assignment]
    run("apart", PADDED)
    dist.destroy_process_group()


def read_base() -> Checkpoint:
    return initial_checkpoint(FINE_TUNED, narrow(), base_of(narrow()), NAMES)[0]


def read_teacher() -> Checkpoint:
    return initial_checkpoint(DISTILLED, narrow(), base_of(narrow()), NAMES)[0]


def read_uncut() -> Checkpoint:
    shape = shallow_config(PRUNED.model)
    return initial_checkpoint(PRUNED, shape, base_of(shape), NAMES)[0]


def trained(folder: Path, backend: str, latents: Artifact) -> Path:
    """The folder in which two processes have done their trainings."""
    paths = [str(path) for path in latents.paths("*.arrow")]
    run_ranks("tests.edt_core.test_training_ranks", 2, folder, backend, *paths)
    return folder


def recorded(folder: Path, name: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.{rank}.json").read_text())
    return found


def check_compiled(folder: Path) -> None:
    for rank in range(2):
        eager, ours = (recorded(folder, f"compile {value}", rank) for value in (False, True))
        assert ours["losses"] == pytest.approx(eager["losses"], rel=BOUND)
        assert len(ours["losses"]) == CONFIG.max_steps
        assert ours["losses"][0] != ours["losses"][-1]
        assert not ours["warnings"], "it was compiled"
    assert recorded(folder, "compile True", 0)["losses"] == recorded(folder, "compile True", 1)["losses"]


@pytest.fixture(scope="module")
def processes(forks: None, latents_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("ranks"), "aot_eager", latents_artifact)


@pytest.mark.extern
def test_compiled_blocks_train_the_same_on_two_processes(processes: Path) -> None:
    check_compiled(processes)


@pytest.mark.extern
def test_shared_padded_projections_train_the_same_bits_on_two_processes(processes: Path) -> None:
    """With micro-batches, of which only the last one exchanges gradients, and blocks that are recomputed."""
    assert recorded(processes, "shared", 0)["losses"] == recorded(processes, "apart", 0)["losses"]
    last = PADDED.max_steps
    assert contents(place(processes / "shared", last)) == contents(place(processes / "apart", last))
    for step in (last // 2, last):
        shared, apart = (contents(processes / run / "snapshots" / f"step-{step:08d}") for run in ("shared", "apart"))
        assert shared == apart
        assert len(shared) == 2


@pytest.mark.extern
@pytest.mark.usefixtures("quickly", "one_thread")
def test_a_head_trains_the_same_on_two_processes(processes: Path, latents_artifact: Artifact, tmp_path: Path) -> None:
    """Its weights are equal on both, and those of one process with the same micro-batches."""
    first, second = (recorded(processes, "aligned", rank) for rank in range(2))
    assert first["head"] == second["head"]
    assert first["losses"] == second["losses"]
    dataset = LatentDataset(latents_artifact.paths("*.arrow"))
    alone = train(ALIGNED, narrow(), dataset, LocalContext(tmp_path))
    assert first["losses"] == pytest.approx([row["loss"] for row in alone.history.rows], rel=BOUND)
    expected = [float(value.detach().double().sum()) for value in alone.heads().values()]
    assert first["head"] == pytest.approx(expected, rel=BOUND, abs=BOUND)
    assert len(expected) == 4


@pytest.mark.extern
@pytest.mark.usefixtures("quickly", "one_thread")
def test_few_parameters_train_the_same_on_two_processes(
    processes: Path, dataset: LatentDataset, tmp_path: Path
) -> None:
    """Each reads the base model and adapts it alike; gradients of scales and biases are exchanged."""
    first, second = (recorded(processes, "fine-tuned", rank) for rank in range(2))
    assert first["weights"] == second["weights"]
    alone = train(FINE_TUNED, narrow(), dataset, LocalContext(tmp_path), read_base)
    assert first["losses"] == pytest.approx([row["loss"] for row in alone.history.rows], rel=BOUND)
    assert first["losses"][0] != first["losses"][-1]
    expected = [float(value.detach().double().sum()) for value in alone.model.parameters()]
    assert first["weights"] == pytest.approx(expected, rel=BOUND, abs=1e-2)
    moved = load_checkpoint(place(tmp_path, FINE_TUNED.max_steps)).tensors["model.safetensors"]
    assert 0 < len(moved) < len(expected)


@pytest.mark.extern
def test_muon_steps_the_same_on_two_processes_and_resumes_exactly(processes: Path, dataset: LatentDataset) -> None:
    first, second = (recorded(processes, "muon", rank)["losses"] for rank in range(2))
    assert first == second
    last = MUON.max_steps
    assert contents(place(processes / "muon", last)) == contents(place(processes / "muon again", last))
    context = LocalContext(processes / "alone")
    alone = train(MUON.model_copy(update={"num_workers": 1}), narrow(), dataset, context)
    assert [row["loss"] for row in alone.history.rows] == pytest.approx(first, rel=BOUND)


@pytest.mark.extern
@pytest.mark.usefixtures("quickly", "one_thread")
def test_a_student_learns_the_same_on_two_processes_and_resumes_exactly(
    processes: Path, dataset: LatentDataset, tmp_path: Path
) -> None:
    """Each has the whole teacher, and asks it for its own rows."""
    first, second = (recorded(processes, "distilled", rank) for rank in range(2))
    assert (first["losses"], first["weights"]) == (second["losses"], second["weights"])
    last = DISTILLED.max_steps
    assert contents(place(processes / "distilled", last)) == contents(place(processes / "distilled again", last))
    alone = train(DISTILLED, narrow(), dataset, LocalContext(tmp_path), read_teacher)
    assert first["losses"] == pytest.approx([row["loss"] for row in alone.history.rows], rel=BOUND)


@pytest.mark.extern
@pytest.mark.usefixtures("quickly", "one_thread")
def test_gates_train_the_same_on_two_processes_and_resume_exactly(
    processes: Path, dataset: LatentDataset, tmp_path: Path
) -> None:
    """Each draws the choices of its own samples; the optimizer's state of the gates is one rank's."""
    first, second = (recorded(processes, "pruned", rank) for rank in range(2))
    assert [first[name] for name in ("losses", "weights", "head")] == [
        second[name] for name in ("losses", "weights", "head")
    ]
    last = PRUNED.max_steps
    assert contents(place(processes / "pruned", last)) == contents(place(processes / "pruned again", last))
    alone = train(PRUNED, shallow_config(PRUNED.model), dataset, LocalContext(tmp_path), read_uncut)
    assert first["losses"] == pytest.approx([row["loss"] for row in alone.history.rows], rel=BOUND)


@pytest.mark.extern
@pytest.mark.slow
@pytest.mark.usefixtures("forks")
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler for CPUs needs g++")
def test_blocks_in_machine_code_train_the_same_on_two_processes(latents_artifact: Artifact, tmp_path: Path) -> None:
    check_compiled(trained(tmp_path, "inductor", latents_artifact))


if __name__ == "__main__":
    own_rank, _, own_folder, others = join(sys.argv[1:])
    _work(own_rank, own_folder, others[0], [Path(path) for path in others[1:]])

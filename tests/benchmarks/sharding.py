"""What `train.shard` saves: `python -m tests.benchmarks.sharding WORK [MODEL] [WORKERS]`, in WORK, an empty folder.

Processes on this machine train a model over gloo on made-up latents, in three steps of one image each and with each
mode, and write a checkpoint. Prints the resident memory of each process after the second step, after the checkpoint,
whose copy stays allocated, the estimate of what the mode changes, and the seconds of the third step. The files of
`none` and `optimizer` are compared, and the weights and averages of `full` with them.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from edt_core.config import TrainConfig
from edt_core.data.latents import LatentDataset, LatentInfo, LatentShardWriter
from edt_core.data.scale import LatentScale
from edt_core.memory import resident_bytes
from edt_core.models import model_config
from edt_core.training.context import LocalContext
from edt_core.training.estimate import estimate
from edt_core.training.loop import train
from edt_core.training.ranks import Ranks
from jobs.benchmark.table import hardware
from tests.support.gloo import join, run_ranks
from tests.support.local_training import contents

SIDE, STEPS, MODES = 256, 3, ("none", "optimizer", "full")
_MIB = 1 << 20


class Measured(LocalContext):
    """A context that notes this process's memory after each step."""

    def has_news(self) -> bool:
        self.__dict__.setdefault("resident", []).append(resident_bytes())
        self.__dict__.setdefault("times", []).append(time.perf_counter())
        return False


def config_of(model: str, workers: int, mode: str) -> TrainConfig:
    """A training of three steps, one image for each worker."""
    return TrainConfig(
        model=model,
        global_batch_size=workers,
        num_workers=workers,
        max_steps=STEPS,
        checkpoint_every=STEPS,
        masked_loss=False,
        shard=mode,
    )


def write_latents(folder: Path, rows: int) -> Path:
    """A shard of made-up latents."""
    shape, rng = (4, SIDE // 8, SIDE // 8), np.random.default_rng(0)
    info = LatentInfo("test", LatentScale(1.0), SIDE, shape, "images-00000.tar")
    sides = rng.standard_normal((rows, 2, 2, *shape), np.float32)
    path = folder / "latents-00000.arrow"
    with LatentShardWriter(path, info) as writer:
        writer.write([str(row) for row in range(rows)], np.zeros(rows, np.int64), np.abs(sides))
    return path


def work(rank: int, workers: int, folder: Path, model: str, mode: str) -> None:
    """One process of a training: its memory after the second step, and after the checkpoint."""
    context = Measured(folder / mode, Ranks(rank, workers))
    latents = LatentDataset([folder / "latents-00000.arrow"])
    state = train(config_of(model, workers, mode), model_config(model, SIDE, 10), latents, context)
    assert state.step == STEPS
    times = context.__dict__["times"]  # noted within each step
    found = [context.__dict__["resident"][1], resident_bytes(), times[2] - times[1]]
    (folder / f"{mode}.{rank}.json").write_text(json.dumps(found))


def main(folder: Path, model: str = "EDT-S/2", workers: str = "2") -> None:
    """Print the memory of each process in each mode."""
    folder.mkdir(parents=True, exist_ok=True)
    write_latents(folder, 4 * int(workers))
    print(f"{model}, {workers} processes, {hardware()}\n")
    print("| shard | process | after a step, MiB | after the checkpoint, MiB | state by estimate, MiB | a step, s |")
    print("|---|---|---|---|---|---|")
    for mode in MODES:
        run_ranks("tests.benchmarks.sharding", int(workers), folder, model, mode)
        needs = estimate(config_of(model, int(workers), mode), model_config(model, SIDE, 10), 100)
        for rank in range(int(workers)):
            step, end, seconds = json.loads((folder / f"{mode}.{rank}.json").read_text())
            cells = (step / _MIB, end / _MIB, needs.state / _MIB)
            print(f"| {mode} | {rank} | {' | '.join(f'{cell:,.0f}' for cell in cells)} | {seconds:.2f} |")
    print(f"\nequal files of none and optimizer: {contents(folder / MODES[0]) == contents(folder / MODES[1])}")
    checkpoints = [folder / mode / "checkpoints" / f"step-{STEPS:08d}" for mode in ("none", "full")]
    for name in ("model.safetensors", "ema.safetensors"):
        plain, full = (load_file(checkpoint / name) for checkpoint in checkpoints)
        largest = max(float((plain[key] - full[key]).abs().max()) for key in plain)
        print(f"largest difference of full in {name}: {largest:.1e}")


if __name__ == "__main__":
    if len(sys.argv) > 4:
        own_rank, world, place, (name, own_mode) = join(sys.argv[1:])
        work(own_rank, world, place, name, own_mode)
    else:
        main(Path(sys.argv[1]), *sys.argv[2:])

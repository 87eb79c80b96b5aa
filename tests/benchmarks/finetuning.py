"""What fine-tuning few parameters saves: `python tests/benchmarks/finetuning.py [--model EDT-S/2] [--turns 5]`.

For each value of `train.trainable`: trained parameters, FLOPs and processor seconds a step (the three in turns), the
growth of the process's memory (each in a process of its own), and the tensors of a checkpoint. Prints a Markdown table.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch

from edt_core.acceptance.subjects import step_inputs
from edt_core.config import TrainConfig
from edt_core.memory import peak_bytes, reset_peak, resident_bytes
from edt_core.models import ModelConfig, model_config
from edt_core.training.ranks import Ranks
from edt_core.training.start.trainable import count_trained, step_flops
from edt_core.training.state import to_checkpoint
from jobs.benchmark.table import mib
from jobs.benchmark.train import BareStep, in_turns

KINDS = ("all", "difffit", "bias")
CPU = torch.device("cpu")


def config_of(kind: str, model: str, batch_size: int) -> TrainConfig:
    start = {} if kind == "all" else {"init_from": "models:/base/1"}
    fields = {"model": model, "global_batch_size": batch_size, "trainable": kind, **start}
    return TrainConfig.model_validate(fields)


def step_of(kind: str, model: ModelConfig, name: str, batch_size: int) -> BareStep:
    config = config_of(kind, name, batch_size)
    return BareStep(config, model, step_inputs(config, model, CPU), Ranks(device=CPU))


def memory_of(kind: str, model: ModelConfig, name: str, batch_size: int) -> dict[str, int]:
    """Bytes by which this process grew at most during two steps, and bytes of the tensors of its checkpoint."""
    reset_peak()
    before = resident_bytes()
    step = step_of(kind, model, name, batch_size)
    for _ in range(2):
        step()
    grown = peak_bytes() - before
    tensors = to_checkpoint(step.state, step.config, num_samples=1).tensors
    sizes = [tensor.nbytes for file in tensors.values() for tensor in file.values()]
    return {"memory": grown, "checkpoint": sum(sizes)}


def in_a_process(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    options = ["--model", arguments.model, "--image-size", str(arguments.image_size), "--memory-of", kind]
    options += ["--batch-size", str(arguments.batch_size)]
    done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="EDT-S/2")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = model_config(arguments.model, arguments.image_size)
    if arguments.memory_of:
        print(json.dumps(memory_of(arguments.memory_of, model, arguments.model, arguments.batch_size)))
        return
    steps = {kind: step_of(kind, model, arguments.model, arguments.batch_size) for kind in KINDS}
    seconds = in_turns(steps, arguments.turns, CPU, time.process_time)
    subject = f"{arguments.model}, batch {arguments.batch_size}"
    print(f"| {subject} | parameters | FLOPs | processor s a step | memory | checkpoint |")
    print("|---|---|---|---|---|---|")
    whole = step_flops(config_of("all", arguments.model, 1), model)
    for kind in KINDS:
        config, size = config_of(kind, arguments.model, arguments.batch_size), in_a_process(kind, arguments)
        flops, parameters = step_flops(config, model) / whole, count_trained(config, model)
        share = f"{seconds[kind]:.3f} ({seconds[kind] / seconds['all']:.2f})"
        print(
            f"| {kind} | {parameters:,} | {flops:.2f} | {share} | {mib(size['memory'])} | {mib(size['checkpoint'])} |"
        )


if __name__ == "__main__":
    main()

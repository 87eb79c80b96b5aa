"""Processes that train together over gloo: ranks of one training, each a Python module of the tests."""

import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from edt_core.training import loop
from tests.support.servers import free_port

_PATIENCE_S = 1200


def run_ranks(module: str, world_size: int, folder: Path, *arguments: str) -> None:
    """Run a module in so many processes, with rank, world size, port, folder and these arguments; all must succeed."""
    port, environment = free_port(), {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    logs, processes = [folder / f"log.{rank}.txt" for rank in range(world_size)], list[subprocess.Popen[bytes]]()
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", module, *map(str, (rank, world_size, port, folder)), *arguments]
            with log.open("w") as file:
                root = Path(__file__).parents[2]
                processes.append(subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=root))
        codes = [process.wait(timeout=_PATIENCE_S) for process in processes]
        assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def join(arguments: Sequence[str]) -> tuple[int, int, Path, list[str]]:
    """Join the other ranks, by what `run_ranks` passes; return rank, world size, folder and the further arguments."""
    rank, world_size, port = map(int, arguments[:3])
    torch.set_num_threads(1)
    loop.matmul_rate = lambda *_: 1e9  # type: ignore[assignment]
    patience = timedelta(seconds=_PATIENCE_S)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, timeout=patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=patience)
    return rank, world_size, Path(arguments[3]), list(arguments[4:])

"""Processes that train together over gloo: ranks of one training, each a Python module of the tests.

They are forks of one process that has imported PyTorch, which would take each of them seconds. Run as a module, this
file is that process.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from edt_core.training import loop
from tests.support.servers import free_port

_PATIENCE_S = 1200
_MARK = "forked: "  # before the server's answers, among what else it may print


def run_ranks(module: str, world_size: int, folder: Path, *arguments: str) -> None:
    """Run a module in so many processes, with rank, world size, port, folder and these arguments; all must succeed."""
    port = free_port()
    run_forked(module, [[str(rank), str(world_size), str(port), str(folder), *arguments] for rank in range(world_size)])


def run_forked(module: str, arguments: Sequence[Sequence[str]]) -> list[str]:
    """Run a module in a process for each list of arguments; return what each has printed. All must succeed."""
    server = _server()
    pids = _asked(server, {"module": module, "arguments": arguments})
    try:
        codes, printed = _answer(server)
    except BaseException:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _server.cache_clear()
        raise
    assert not any(codes), "\n".join(text[-3000:] for text in printed)
    return list(printed)


@cache
def _server() -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.support.gloo"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    atexit.register(end_server)
    return process


def end_server() -> None:
    """End the process that forks, if there is one: it holds 400 MiB."""
    if not _server.cache_info().currsize:
        return
    server = _server()
    _server.cache_clear()
    assert server.stdin is not None
    with suppress(BrokenPipeError):
        server.stdin.close()
    server.wait(30)


def _asked(server: "subprocess.Popen[str]", job: dict[str, Any]) -> Any:
    assert server.stdin is not None
    print(json.dumps(job), file=server.stdin, flush=True)
    return _answer(server)


def _answer(server: "subprocess.Popen[str]") -> Any:
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    raise RuntimeError(f"the process that forks has ended with {server.wait()}")


def _serve() -> None:
    """Answer each job with the ids of its processes, and with their exit codes and what they printed at their end."""
    import pytorch_optimizer  # noqa: F401  # what a training imports when it begins

    for line in sys.stdin:
        job = json.loads(line)
        importlib.import_module(job["module"])  # its own imports, once
        logs = [os.memfd_create(f"log.{number}") for number in range(len(job["arguments"]))]
        pids = []
        for arguments, log in zip(job["arguments"], logs, strict=True):
            if (pid := os.fork()) == 0:
                _become(job["module"], arguments, log)
            pids.append(pid)
        print(_MARK + json.dumps(pids), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(_MARK + json.dumps([codes, [_text(log) for log in logs]]), flush=True)


def _become(module: str, arguments: list[str], log: int) -> None:
    """Be the module as a program whose output goes to `log`."""
    nothing, code = os.open(os.devnull, os.O_RDONLY), 1
    for own, file in ((0, nothing), (1, log), (2, log)):
        os.dup2(file, own)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _text(log: int) -> str:
    with os.fdopen(log, "rb") as file:
        file.seek(0)
        return file.read().decode(errors="replace")


def join(arguments: Sequence[str]) -> tuple[int, int, Path, list[str]]:
    """Join the other ranks, by what `run_ranks` passes; return rank, world size, folder and the further arguments."""
    rank, world_size, port = map(int, arguments[:3])
    torch.set_num_threads(1)
    loop.matmul_rate = lambda *_: 1e9  # type: ignore[assignment]
    patience = timedelta(seconds=_PATIENCE_S)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, timeout=patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=patience)
    return rank, world_size, Path(arguments[3]), list(arguments[4:])


if __name__ == "__main__":
    _serve()

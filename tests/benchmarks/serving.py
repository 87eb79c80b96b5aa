"""Requests a second of `edt serve` beside `mlflow models serve` of one version: `python -m tests.benchmarks.serving`.

A small registered model (EDT-Tiny/2 of 32 px) on loopback. At each concurrency so many clients send requests of one
image, each its next one when the last is answered; a refused client waits as `Retry-After` says. The servers run one
after the other, with one CPU thread each. Prints a Markdown table.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import requests

from pipelines.cluster.ui import free_port
from tests.support.processes import descendants, kill, stat, wait_for
from tests.support.registry import Registry
from tests.support.serving import NAME, add_served
from tests.support.small import EDT, environment

_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass
class Load:
    """What the clients of one concurrency saw."""

    seconds: float = 0.0
    answered: list[float] = field(default_factory=list)  # seconds of each request that was answered
    refused: int = 0

    def row(self, server: str, clients: int) -> str:
        quantiles = statistics.quantiles(self.answered, n=20) if len(self.answered) > 1 else self.answered * 20
        return (
            f"| {server} | {clients} | {len(self.answered) / self.seconds:.2f} | {self.refused / self.seconds:.2f} "
            f"| {statistics.median(self.answered):.2f} | {quantiles[-1]:.2f} |"
        )


def measured(ask: Callable[[requests.Session, int], requests.Response], clients: int, seconds: float) -> Load:
    load, until = Load(), time.monotonic() + seconds

    def client(number: int) -> None:
        with requests.Session() as session:
            turn = 0
            while (began := time.monotonic()) < until:
                answer = ask(session, number * 10_000 + turn)
                turn += 1
                if answer.status_code == 200:
                    load.answered.append(time.monotonic() - began)
                else:
                    assert answer.status_code == 503, answer.text
                    load.refused += 1
                    time.sleep(float(answer.headers["Retry-After"]))

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    load.seconds = time.monotonic() - began
    return load


@contextmanager
def server(command: list[str], health: str, uri: str) -> Iterator[None]:
    """A server until the end of the context. It is stopped with SIGTERM, with the processes below it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow looks for uvicorn there
    variables = environment(MLFLOW_TRACKING_URI=uri, PATH=path, **_THREADS)
    process = subprocess.Popen(command, env=variables)
    try:
        wait_for(lambda: _answers(health) or process.poll() is not None)
        assert process.poll() is None, f"{command} ended with {process.returncode}"
        yield
    finally:
        below = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        process.wait()
        for pid in [pid for pid, began in below.items() if (now := stat(pid)) is not None and now[2] == began]:
            kill(pid)  # MLflow's own server outlives the command


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=10).status_code == 200
    except requests.RequestException:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-queue", type=int, default=32)
    options = parser.parse_args()
    params = {"num_inference_steps": options.steps, "cfg_scale": 1.5}

    with tempfile.TemporaryDirectory(prefix="edt-serving-") as folder:
        registry = Registry(Path(folder) / "store")
        add_served(registry, 0)
        uri, port = registry.catalog.tracking_uri, free_port("127.0.0.1", 0)
        url = f"http://127.0.0.1:{port}"
        ours = [*EDT, "serve", NAME, "--port", str(port), "--device", "cpu", "--num-cpus", "1"]
        ours += ["--batch-size", str(options.batch_size), "--max-queue", str(options.max_queue)]
        mlflow = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", f"models:/{NAME}@champion"]
        mlflow += ["--env-manager", "local", "--port", str(port)]

        def ask_ours(session: requests.Session, seed: int) -> requests.Response:
            return session.post(f"{url}/sample", json={"labels": [seed % 4], "seed": seed, "format": "npz", **params})

        def ask_mlflow(session: requests.Session, seed: int) -> requests.Response:
            body = {"inputs": [seed % 4], "params": {"seed": seed, **params}}
            return session.post(f"{url}/invocations", json=body)

        print("| server | clients | answered/s | refused/s | median s | 95 % within s |")
        print("|---|---|---|---|---|---|", flush=True)
        for name, command, ask in (("`edt serve`", ours, ask_ours), ("`mlflow models serve`", mlflow, ask_mlflow)):
            with server(command, f"{url}/health", uri):
                measured(ask, 1, 2)  # the first calls are slower
                for clients in options.clients:
                    print(measured(ask, clients, options.seconds).row(name, clients), flush=True)


if __name__ == "__main__":
    main()

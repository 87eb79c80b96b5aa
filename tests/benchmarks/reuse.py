"""What a run costs that reuses everything: `python tests/benchmarks/reuse.py STORE [KEY=VALUE ...]`, of the quickstart.

Each part is timed where the run itself does it, in a process of its own; beside it what Ray's start would add, which
such a run leaves out. The quickstart, with these fields set, is run first where the store does not have it.
"""

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

TIMES = 5


def timed(parts: dict[str, float], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def timing(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*arguments, **named)
        finally:
            parts[name] += time.perf_counter() - began

    return timing


def run_once(store: str, assignments: Sequence[str]) -> dict[str, float]:
    """One run in this process, by parts [s]."""
    began = time.perf_counter()
    parts: dict[str, float] = defaultdict(float)
    from pipelines import pipeline as workflows
    from pipelines.config.schema import load_config
    from pipelines.terminal.terminal import Terminal

    parts["imports (torch, ray, mlflow)"] = time.perf_counter() - began
    for name, attribute in (
        ("identity of the source: sha256 of every image", "prepare_source"),
        ("the 11 steps up to the evaluations looked up", "call_steps"),
        ("the registered version looked up", "promote"),
        ("the record: configuration, versions, parameters", "_record_start"),
    ):
        setattr(workflows, attribute, timed(parts, name, getattr(workflows, attribute)))
    opened = timed(parts, "MLflow opened (beside the source)", workflows.Catalog.open)
    workflows.Catalog.open = opened  # type: ignore[method-assign]
    with Terminal() as terminal:
        outcome = workflows.run(load_config("quickstart", assignments, store), terminal)
    assert (outcome.executed, outcome.failures) == (0, {}), outcome
    parts["whole run, imports included"] = time.perf_counter() - began
    return parts


def ray_start() -> dict[str, float]:
    """Ray's own start, and a first task [s]."""
    import ray

    from jobs.runtime.cluster import connect

    began = time.perf_counter()
    connect(min_cpus=2)
    started = time.perf_counter()
    ray.get(ray.remote(lambda: None).remote())
    return {"Ray's start (not part of it)": started - began, "Ray's first task": time.perf_counter() - started}


def child(*arguments: str) -> dict[str, float]:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    parts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**parts, "whole process": time.perf_counter() - began}


def main(store: str, *assignments: str) -> None:
    options = [part for text in assignments for part in ("--set", text)]
    subprocess.run([sys.executable, "-m", "pipelines.cli", "run", "quickstart", "--store", store, *options], check=True)
    runs = [child("--once", store, *assignments) for _ in range(TIMES)]
    rays = [child("--ray") for _ in range(TIMES)]
    print(f"\n| part of a run that reuses all 12 steps | median of {TIMES} [s] |\n|---|---|")
    for name in runs[0]:
        print(f"| {name} | {median(run[name] for run in runs):.2f} |")
    for name in list(rays[0])[:2]:
        print(f"| {name} | {median(run[name] for run in rays):.2f} |")


if __name__ == "__main__":
    first, *others = sys.argv[1:]
    if first == "--once":
        print("\n" + json.dumps(run_once(others[0], others[1:])))
    elif first == "--ray":
        print("\n" + json.dumps(ray_start()))
    else:
        main(str(Path(first).absolute()), *others)

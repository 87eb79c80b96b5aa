"""Processes that register and move aliases at once, through our own functions."""

import logging
import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

NAME = "edt-race"
ALIASES = ("candidate", "champion")
PRELOAD = [  # imported once, and not by each process
    "pipelines.registry.aliases",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "alembic.command",
    "tests.support.races",
]


def at_once(work: Callable[..., None], processes: int, *arguments: Any) -> list[Any]:
    """The answers of `work(index, *arguments)` in processes that start together; raises what one of them raised."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    answers, barrier = context.Queue(), context.Barrier(processes)
    started = [
        context.Process(target=_answering, args=(work, index, arguments, answers, barrier), daemon=True)
        for index in range(processes)
    ]
    for process in started:
        process.start()
    found = [answers.get(timeout=240) for _ in started]
    for process in started:
        process.join(30)
    if errors := [answer for answer in found if isinstance(answer, Exception)]:
        raise errors[0]
    return found


def _answering(
    work: Callable[..., Any], index: int, arguments: tuple[Any, ...], answers: "Queue[Any]", barrier: Barrier
) -> None:
    barrier.wait(120)
    try:
        answers.put(work(index, *arguments))
    except Exception as error:
        answers.put(RuntimeError(f"process {index}: {type(error).__name__}: {error}"))


def log_run(index: int, store: Path) -> None:
    """A run with parameters and metrics. The first that comes makes MLflow's tables."""
    from edt_core.store.folder import Folder
    from pipelines.tracking.catalog import Catalog

    os.environ.pop("MLFLOW_TRACKING_URI", None)  # it is that of the fork server's start
    catalog = Catalog.open(Folder.at(store), "race")
    run = catalog.start_run("child", {})
    catalog.log_params(run, {"lr": 0.1, "model": {"dim": index}})
    for step in range(3):
        catalog.log_metrics(run, {"loss": 1.0 / (step + 1)}, step)
    catalog.end_run(run, "FINISHED")


def register(index: int, store: Path, uri: str | None, own: int, shared: int) -> dict[str, Any]:
    """`own` versions of this process alone and `shared` that every process registers, each with a move of an alias.

    The first that comes makes MLflow's tables.
    """
    from edt_core.store.folder import Folder
    from pipelines.registry.aliases import add_version, move_alias
    from pipelines.tracking.catalog import Catalog

    os.environ.pop("MLFLOW_TRACKING_URI", None)  # it is that of the fork server's start
    if uri is not None:
        os.environ["MLFLOW_TRACKING_URI"] = uri
    retries = _Counting()
    logging.getLogger("pipelines.tracking.catalog").addHandler(retries)
    logging.getLogger("pipelines.tracking.catalog").setLevel(logging.DEBUG)
    came = time.monotonic()
    catalog = Catalog.open(Folder.at(store), "race")
    began = time.monotonic()
    made = {}
    names = [f"shared-{k}" for k in range(shared)] + [f"own-{index}-{k}" for k in range(own)]
    for k, name in enumerate(names):
        version = add_version(catalog, NAME, f"file:///nowhere/{index}/{name}", None, {}, {"edt.checkpoint": name})
        made[name] = int(version.version)
        move_alias(catalog, version, ALIASES[k % 2])
    took = {"opening": began - came, "seconds": time.monotonic() - began}
    return {"made": made, "retries": retries.count, "experiment": catalog.experiment_id, **took}


class _Counting(logging.Handler):
    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def check_registry(store: Path, answers: list[dict[str, Any]]) -> None:
    """Every version that a process was given is there under its number, none twice, and aliases point at versions."""
    from edt_core.store.folder import Folder
    from pipelines.registry.aliases import search
    from pipelines.tracking.catalog import Catalog

    catalog = Catalog.open(Folder.at(store), "race")
    there = {int(v.version): v.tags["edt.checkpoint"] for v in search(catalog, f"name = '{NAME}'")}
    given = {(number, name) for answer in answers for name, number in answer["made"].items()}
    assert given == set(there.items())  # none lost, none left over, and all were given the same number of a shared one
    assert len(set(there.values())) == len(there)
    for alias in ALIASES:
        assert int(catalog.client.get_model_version_by_alias(NAME, alias).version) in there

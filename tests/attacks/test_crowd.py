"""Many commands at once on the SQLite file of one store, while another process registers versions in it."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.races import at_once
from tests.support.registry import NAME, Registry

READING = (
    ("models", "list"),
    ("models", "list", "--json"),
    ("models", "show", f"{NAME}@champion"),
    ("models", "compare", f"{NAME}/1", f"{NAME}/2"),
    ("lineage", f"{NAME}@champion"),
    ("artifacts",),
)
WORK = 3  # commands, or registered versions, of a process


def own_model(index: int) -> str:
    """The model whose aliases one process alone moves."""
    return f"edt-own-{index}"


def crowd(index: int, root: Path) -> list[tuple[int, str]]:
    """The first process registers versions; the odd ones move aliases, one each of its own model; the others read.

    Returns exit code and messages of each command.
    """
    from edt_core.store.folder import Folder
    from pipelines.tracking.catalog import Catalog
    from tests.support.small import edt

    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if index == 0:
        registry = object.__new__(Registry)  # its constructor makes an empty MLflow
        registry.root, registry.catalog = root, Catalog.open(Folder.at(root), "test")
        for number in range(WORK):
            registry.add(f"new-{number}", 1.0 - 0.3 * number)  # each better than the one before
        return []
    ended = []
    for number in range(WORK):
        words = READING[(index // 2 + number) % len(READING)]
        if index % 2:
            moves = ("promote", f"{own_model(index)}/2", "--force"), ("rollback", own_model(index))
            words = ("models", *moves[number % 2])
        done = edt(*words, "--store", str(root))
        ended.append((done.returncode, done.stderr))
    return ended


@pytest.mark.extern
@pytest.mark.parametrize("processes", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_crowd_at_one_sqlite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """All commands end well, no version and no alias is lost, and the champion is the best one."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry = Registry(tmp_path / "store")
    registry.add("a", 5.0)
    registry.add("b", 4.0)
    movers = range(1, processes, 2)
    for index in movers:
        for key, value in (("c", 2.0), ("d", 3.0)):  # the second one is worse, and becomes champion by force alone
            registry.add(f"{key}-{index}", value, name=own_model(index))

    answers: list[list[tuple[int, str]]] = at_once(crowd, processes, registry.root)

    ended: list[Any] = [command for answer in answers for command in answer]
    assert len(ended) == WORK * (processes - 1)
    for code, messages in ended:
        assert code == 0, messages
        assert "Traceback" not in messages
        assert "locked" not in messages
    assert registry.champion() == str(2 + WORK)
    assert {registry.champion(own_model(index)) for index in movers} == {"2"}  # promoted, rolled back, promoted
    for name in (NAME, *map(own_model, movers)):
        aliases = registry.catalog.client.get_registered_model(name).aliases
        assert {"champion", "candidate"} <= aliases.keys(), (name, aliases)

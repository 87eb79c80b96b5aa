"""The promotion as a step: who walks the graph calls it by one protocol, and what comes of it there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edt_core.config import Section
from edt_core.store.artifact import Artifact, Source
from edt_core.store.folder import Folder
from edt_core.store.store import Store
from jobs.stages.stage import Stage
from pipelines.engine.step import StepFuture
from pipelines.engine.steps import Promotion
from pipelines.engine.workflow import Workflow
from pipelines.plan import Planner
from pipelines.terminal.terminal import Terminal

Deciding = Callable[[Any, str, Mapping[str, Artifact]], "Decision"]
STAGE = Stage("make", "images", 1, Section, lambda *_: {}, roles=("source",))


@dataclass(frozen=True)
class Decision:
    version: str

    def __str__(self) -> str:
        return "first champion: fid 4.5"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(Folder.at(tmp_path / "store"))


def artifact(store: Store) -> Artifact:
    """What an earlier run has made."""
    identity = STAGE.fingerprint(Section(), {"source": "5" * 64})
    out = store.writer(STAGE.kind, identity)
    out.write_bytes("file", b"x")
    return out.commit({}, {"source": "5" * 64}, {}, step_version=1)


def promotion(step: StepFuture, decide: Deciding, found: str | None = None) -> Promotion[Decision]:
    def find(catalog: Any, artifacts: Mapping[str, Artifact]) -> tuple[Decision, str] | None:
        return None if found is None else (Decision(found), "run of then")

    steps = {"evaluation": step, "other": StepFuture("other edt", "images", "e" * 64)}  # not made, and not asked for
    return Promotion("edt", "f" * 64, steps, ("evaluation",), step.name, "report edt", decide, find)


def never(catalog: Any, run_id: str, artifacts: Mapping[str, Artifact]) -> Decision:
    raise AssertionError("a plan decides nothing")


def workflow(store: Store) -> Workflow:
    class Nothing:
        def unfinished_runs(self) -> set[str]:
            return set()

    return Workflow(store, Nothing(), "run", Terminal(), connect=lambda: False)  # type: ignore[arg-type]


def test_a_run_decides_on_the_artifacts_of_the_branch(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    made = artifact(store)
    running = workflow(store)
    step = running.step("evaluate edt", STAGE, Section(), source=Source("", "5" * 64))
    given: list[Any] = []

    def decide(catalog: Any, run_id: str, artifacts: Mapping[str, Artifact]) -> Decision:
        given.extend([run_id, artifacts["evaluation"].fingerprint])
        return Decision("3")

    assert running.promote(promotion(step, decide)) == Decision("3")
    assert given == ["run", made.fingerprint]
    assert running.culprits() == {}
    assert "version 3: first champion: fid 4.5" in capsys.readouterr().out


def test_a_registry_that_fails_is_the_failure_of_the_promotion(store: Store) -> None:
    artifact(store)
    running = workflow(store)
    step = running.step("evaluate edt", STAGE, Section(), source=Source("", "5" * 64))
    error = OSError("the server is away")

    def decide(catalog: Any, run_id: str, artifacts: Mapping[str, Artifact]) -> Decision:
        raise error

    assert running.promote(promotion(step, decide)) is None
    assert running.culprits() == {"promote edt": error}
    assert running.wait(step)  # the artifacts are there all the same


def test_a_branch_that_failed_is_not_promoted(store: Store) -> None:
    artifact(store)
    running = workflow(store)
    step = running.step("evaluate edt", STAGE, Section(), source=Source("", "5" * 64))
    running.failures[step.name] = error = OSError("no room")
    assert running.promote(promotion(step, never)) is None
    assert running.culprits() == {"evaluate edt": error}


@pytest.mark.parametrize(
    ("known", "made", "found", "actions"),
    [
        (True, True, "3", {"promote edt": ("reuse", "version 3")}),
        (True, True, None, {"promote edt": ("run", "no version"), "report edt": ("run", "it follows")}),
        (False, True, "3", {"promote edt": ("run", "no version"), "report edt": ("run", "it follows")}),
        (True, False, "3", {"promote edt": ("run", "no version"), "report edt": ("run", "it follows")}),
    ],
)
def test_a_plan_knows_a_promotion_by_what_is_registered(
    store: Store, known: bool, made: bool, found: str | None, actions: dict[str, tuple[str, str]]
) -> None:
    if made:
        artifact(store)
    planner = Planner(store, object() if known else None)  # type: ignore[arg-type]
    step = planner.step("evaluate edt", STAGE, Section(), source=Source("", "5" * 64))
    decided = planner.promote(promotion(step, never, found))
    assert decided == (Decision("3") if actions["promote edt"][0] == "reuse" else None)
    told = {name: row for name, row in planner.steps.items() if name != "evaluate edt"}
    assert told.keys() == actions.keys()
    for name, (action, why) in actions.items():
        assert told[name].action == action
        assert told[name].why.startswith(why)
    assert told["promote edt"].run_id == ("run of then" if decided else None)

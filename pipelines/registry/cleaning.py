"""Removing the garbage of a store: what goes is agreed on first, and goes to the trash where the store has one."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from edt_core.environment import utc
from edt_core.errors import UserError
from edt_core.store.layout import MANIFEST_NAME
from edt_core.store.store import Store
from edt_core.store.trash import Discarded, Trash
from pipelines.registry.garbage import Garbage, survey
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import workflow_runs


@dataclass(frozen=True)
class Request:
    """What a person asks for. `empty_trash`: delete what is in the trash, whatever its age."""

    keep_runs: int
    force: bool = False
    empty_trash: bool = False


@dataclass(frozen=True)
class Plan:
    """What may go from the store and what may be deleted from its trash, and what stays: path in the store -> why."""

    garbage: list[Garbage]
    discarded: list[Discarded]
    left_alone: dict[str, str]

    def only(self, agreed: "Plan") -> "Plan":
        """What is in another plan as well."""
        garbage = [item for item in self.garbage if item in agreed.garbage]
        return Plan(garbage, [item for item in self.discarded if item in agreed.discarded], self.left_alone)


@dataclass(frozen=True)
class Removed(Plan):
    """What went: `garbage` to the folder `trash`, or for good where that is None; `discarded` from the trash.

    `failed` is what could not be moved: path in the store -> why.
    """

    trash: str | None = None
    failed: dict[str, str] = field(default_factory=dict)


def plan(store: Store, catalog: Catalog, request: Request) -> Plan:
    """What would go. Nothing is removed. Raises UserError as `survey`."""
    found = survey(store, catalog, request.keep_runs, request.force)
    trash = Trash.of(store.root)
    if trash is None:
        return Plan(found.garbage, [], found.left_alone)
    return Plan(found.garbage, trash.discarded(request.empty_trash), {**found.left_alone, **trash.others()})


def collect(store: Store, catalog: Catalog, request: Request, agree: Callable[[Plan], None] | None = None) -> Removed:
    """Find what may go and remove it. Raises UserError while runs use the store.

    `agree` gets the plan, and raises to stop. Runs may start while it waits for an answer: what may go is looked for
    again afterwards, and nothing goes that was not in the plan.
    """
    _check_ended(store, catalog, request)
    with store.to_itself():
        planned = plan(store, catalog, request)
        if agree is None:
            return remove(store, catalog, planned)
    agree(planned)
    with store.to_itself():
        return remove(store, catalog, plan(store, catalog, request).only(planned))


def remove(store: Store, catalog: Catalog, planned: Plan) -> Removed:
    """Carry out a plan. Each artifact goes whole; killed in the middle, the others stay as they are.

    The MLflow runs that made removed artifacts get the tag `edt.removed`, the time of it.
    """
    trash = Trash.of(store.root)
    folder = None if trash is None else trash.new()
    done = Removed([], [], planned.left_alone, None if folder is None else str(folder))
    for each in planned.discarded:
        assert trash is not None
        trash.delete(each)
        done.discarded.append(each)
    for item in planned.garbage:
        if trash is None or folder is None:
            _delete(store, item)
        elif reason := trash.move(item.path, folder):
            done.failed[item.path] = reason
            continue
        done.garbage.append(item)
        if item.run_id is not None:
            with suppress(Exception):  # the run may be of another server, or deleted
                catalog.set_tags(item.run_id, {"edt.removed": utc()})
    return done


def _delete(store: Store, item: Garbage) -> None:
    """Delete from an object store. The manifest goes first: an artifact that is half deleted is none."""
    if not item.attempt:
        store.root.remove(f"{item.path}/{MANIFEST_NAME}")
    store.root.remove(item.path)


def _check_ended(store: Store, catalog: Catalog, request: Request) -> None:
    """Raise UserError where a run may use a store that cannot tell."""
    if store.root.local is not None or request.force:
        return
    going = [run.info.run_id for run in workflow_runs(catalog) if run.info.status == "RUNNING"]
    if going:
        raise UserError(
            f"{len(going)} runs are in progress or were killed ({', '.join(going[:3])}), and a remote store cannot "
            "tell who uses it; wait for them, or give --force if none is"
        )

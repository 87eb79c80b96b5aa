"""Removal of a store's garbage: the user confirms the plan first; a local store moves the garbage to its trash."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from edt_core.environment import utc
from edt_core.errors import UserError
from edt_core.store.layout import MANIFEST_NAME
from edt_core.store.store import Store
from edt_core.store.trash import Discarded, Trash
from pipelines.registry.garbage import Garbage, Lineage, survey
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import workflow_runs


@dataclass(frozen=True)
class Request:
    """The user's request. `empty_trash`: delete everything in the trash, of any age."""

    keep_runs: int
    force: bool = False
    empty_trash: bool = False


@dataclass(frozen=True)
class Plan:
    """What to remove from the store and to delete from its trash, and what is left alone: path in the store -> why."""

    garbage: list[Garbage]
    discarded: list[Discarded]
    left_alone: dict[str, str]
    lineage: Lineage = field(default_factory=Lineage, kw_only=True)

    def only(self, agreed: "Plan") -> "Plan":
        """The part that is in the agreed plan as well."""
        garbage = [item for item in self.garbage if item in agreed.garbage]
        discarded = [item for item in self.discarded if item in agreed.discarded]
        return Plan(garbage, discarded, self.left_alone, lineage=self.lineage)


@dataclass(frozen=True)
class Removed(Plan):
    """What was removed: `garbage` to the folder `trash`, or for good if that is None; `discarded` from the trash.

    `failed` could not be moved: path in the store -> why.
    """

    trash: str | None = None
    failed: dict[str, str] = field(default_factory=dict)


def plan(store: Store, catalog: Catalog, request: Request) -> Plan:
    """What would be removed. Removes nothing. Raises UserError as `survey`."""
    contents = survey(store, catalog, request.keep_runs, request.force)
    trash = Trash.of(store.root)
    if trash is None:
        return Plan(contents.garbage, [], contents.left_alone, lineage=contents.lineage)
    left_alone = {**contents.left_alone, **trash.others()}
    return Plan(contents.garbage, trash.discarded(request.empty_trash), left_alone, lineage=contents.lineage)


def collect(store: Store, catalog: Catalog, request: Request, agree: Callable[[Plan], None] | None = None) -> Removed:
    """Find the garbage and remove it. Raises UserError while runs use the store.

    `agree` receives the plan, and raises to cancel. Runs may start while it waits for an answer. So the store is
    searched again afterwards, and only what is also in the plan is removed.
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
    """Carry out a plan, one whole artifact at a time: a crash leaves the remaining ones intact.

    The MLflow runs that made removed artifacts get the tag `edt.removed` with the time.
    """
    trash = Trash.of(store.root)
    folder = None if trash is None else trash.new()
    removed = Removed([], [], planned.left_alone, None if folder is None else str(folder), lineage=planned.lineage)
    for each in planned.discarded:
        assert trash is not None
        trash.delete(each)
        removed.discarded.append(each)
    for item in planned.garbage:
        if trash is None or folder is None:
            _delete(store, item)
        elif reason := trash.move(item.path, folder):
            removed.failed[item.path] = reason
            continue
        removed.garbage.append(item)
        if item.run_id is not None:
            with suppress(Exception):  # the run may be of another server, or deleted
                catalog.set_tags(item.run_id, {"edt.removed": utc()})
    return removed


def _delete(store: Store, item: Garbage) -> None:
    """Delete from an object store. The manifest goes first, so that a half deleted artifact does not count as one."""
    if not item.attempt:
        store.root.remove(f"{item.path}/{MANIFEST_NAME}")
    store.root.remove(item.path)


def _check_ended(store: Store, catalog: Catalog, request: Request) -> None:
    """Raise UserError if MLflow has a RUNNING run and the store is remote, which has no locks of its users."""
    if store.root.local is not None or request.force:
        return
    running = [run.info.run_id for run in workflow_runs(catalog) if run.info.status == "RUNNING"]
    if running:
        raise UserError(
            f"{len(running)} runs are in progress or were killed ({', '.join(running[:3])}), and a remote store does "
            "not know which runs use it. Wait until they end; if none is in progress, give --force"
        )

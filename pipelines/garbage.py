"""What of a store nothing needs any more: artifacts that no registered model and no recent run reaches, and the
attempts that were given up.

A store in use is left alone: a workflow holds its store (`Store.in_use`) from before it looks for what is there until
it ends, and this waits for nobody.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edt_core.environment import utc
from edt_core.errors import UserError
from edt_core.manifest import Manifest
from edt_core.schema import KINDS, MANIFEST_NAME
from edt_core.storage import Folder
from pipelines.artifacts import Store
from pipelines.catalog import Catalog
from pipelines.registry import search
from pipelines.runs import steps_of, workflow_runs

Identity = tuple[str, str]  # kind, fingerprint


@dataclass(frozen=True)
class Garbage:
    """One folder that may go: an artifact with all its attempts, or, with `attempt`, one of them."""

    kind: str
    fingerprint: str
    bytes: int
    why: str
    attempt: str = ""
    run_id: str | None = None

    def as_row(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "attempt": self.attempt,
            "bytes": self.bytes,
            "why": self.why,
        }


def roots(catalog: Catalog, keep_runs: int, running: bool) -> set[str]:
    """Fingerprints that stay with all they were made from: of registered versions and of each pipeline's last runs.

    With `running`, of every run that MLflow calls RUNNING as well: those that go on, and those that were killed.
    """
    kept: set[str] = set()
    seen: dict[str, int] = {}
    for run in workflow_runs(catalog):
        name = run.data.tags["edt.workflow"]
        seen[name] = seen.get(name, 0) + 1
        if seen[name] <= keep_runs or (running and run.info.status == "RUNNING"):
            kept |= set(steps_of(run.data.tags).values())
    return kept | {
        v.tags[key] for v in search(catalog, "") for key in ("edt.checkpoint", "edt.evaluation") if key in v.tags
    }


def reachable(made: Mapping[Identity, Manifest], kept: Iterable[str]) -> set[str]:
    """The fingerprints of `kept`, of the reports about them, and of all that these were made from."""
    by_fingerprint = {fingerprint: manifest for (_, fingerprint), manifest in made.items()}
    waiting, found = list(kept), set[str]()
    while waiting:
        identity = waiting.pop()
        if identity not in found:
            found.add(identity)
            if identity in by_fingerprint:
                waiting += by_fingerprint[identity].inputs.values()
        if not waiting:
            waiting += [
                fingerprint
                for (kind, fingerprint), manifest in made.items()
                if kind == "report" and fingerprint not in found and _is_about(manifest, found)
            ]
    return found


def _is_about(report: Manifest, found: set[str]) -> bool:
    return all(report.inputs.get(role) in found for role in ("checkpoint", "evaluation"))


def survey(store: Store, catalog: Catalog, keep_runs: int) -> list[Garbage]:
    """All that may go. Nothing is removed. What has no whole manifest counts as never finished."""
    made = {(kind, name): manifest for kind in KINDS for name, manifest in store.manifests(kind).items()}
    folders = [(kind, name) for kind in KINDS for name in store.root.child(kind).names()]
    # A local store tells itself whether it is used; whatever MLflow calls RUNNING otherwise was killed.
    kept = reachable(made, roots(catalog, keep_runs, running=store.root.local is None))
    found: list[Garbage] = []
    for kind, name in folders:
        found += _garbage_of(store.folder(kind, name), kind, name, made.get((kind, name)), name in kept, keep_runs)
    return found


def _garbage_of(
    folder: Folder, kind: str, name: str, manifest: Manifest | None, kept: bool, keep_runs: int
) -> Iterator[Garbage]:
    if not kept:
        why = f"no registered model and none of the last {keep_runs} runs needs it"
        run_id = manifest.mlflow_run_id if manifest else None
        yield Garbage(kind, name, _size(folder), why if manifest else f"never finished, and {why}", run_id=run_id)
    elif manifest is not None:  # what has no manifest is under way, and goes on in the next run
        for attempt in folder.names():
            if attempt not in (MANIFEST_NAME, manifest.attempt) and not attempt.startswith("."):
                yield Garbage(kind, name, _size(folder.child(attempt)), "another attempt was committed", attempt)


def _size(folder: Folder) -> int:
    return sum(folder.walk().values())


def remove(store: Store, catalog: Catalog, garbage: Iterable[Garbage]) -> None:
    """Remove folders. The manifest goes first: an artifact that is half removed is none.

    The MLflow runs that made removed artifacts get the tag `edt.removed`, the time of it.
    """
    for item in garbage:
        folder = store.folder(item.kind, item.fingerprint)
        if item.attempt:
            folder.remove(item.attempt)
            continue
        folder.remove(MANIFEST_NAME)
        store.root.child(item.kind).remove(item.fingerprint)
        if item.run_id is not None:
            with suppress(Exception):  # the run may be of another server, or deleted
                catalog.set_tags(item.run_id, {"edt.removed": utc()})


def collect(store: Store, catalog: Catalog, keep_runs: int, dry_run: bool, force: bool = False) -> list[Garbage]:
    """Find what may go, and unless `dry_run` remove it; returns it. Raises UserError while runs use the store."""
    if dry_run:
        return survey(store, catalog, keep_runs)
    if store.root.local is None and not force:
        going = [run.info.run_id for run in workflow_runs(catalog) if run.info.status == "RUNNING"]
        if going:
            raise UserError(
                f"{len(going)} runs are going on or were killed ({', '.join(going[:3])}), and a remote store cannot "
                "tell who uses it; wait for them, or give --force if none is"
            )
    with store.to_itself():
        found = survey(store, catalog, keep_runs)
        remove(store, catalog, found)
    return found

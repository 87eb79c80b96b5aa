"""What of a store nothing needs any more: artifacts that no registered model and no recent run reaches, and the
attempts that were given up.

A store in use is left alone: a workflow holds its store (`Store.in_use`) from before it looks for what is there until
it ends, and this waits for nobody. So is whatever MLflow cannot speak for: an artifact that was made by a run of
another MLflow, and everything that is no artifact.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
from edt_core.store.contents import Identity, artifact_folders, files_below, foreign, foreign_names, is_stamped
from edt_core.store.digests import listing
from edt_core.store.folder import Folder
from edt_core.store.layout import MANIFEST_NAME
from edt_core.store.manifest import Manifest, ManifestError
from edt_core.store.store import Store
from jobs.runtime.tracking import SQLITE, own_uri
from pipelines.registry.aliases import search
from pipelines.tracking import runs
from pipelines.tracking.catalog import Catalog


@dataclass(frozen=True)
class Garbage:
    """One folder that may go: an artifact with all its attempts, or, with `attempt`, one of them."""

    kind: str
    fingerprint: str
    bytes: int
    why: str
    attempt: str = ""
    run_id: str | None = None

    @property
    def path(self) -> str:
        """The folder, relative to the store."""
        return "/".join(part for part in (self.kind, self.fingerprint, self.attempt) if part)

    def as_row(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "attempt": self.attempt,
            "bytes": self.bytes,
            "why": self.why,
        }


@dataclass(frozen=True)
class Survey:
    """What of a store may go, and what stays though nothing needs it: path in the store -> why."""

    garbage: list[Garbage]
    left_alone: dict[str, str]


@dataclass
class Contents:
    """What the folders of a store's artifacts hold. `unreadable`: why a manifest that is there cannot be read."""

    folders: list[Identity]
    others: dict[str, str]
    made: dict[Identity, Manifest] = field(default_factory=dict)
    unreadable: dict[Identity, str] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Store) -> "Contents":
        contents = cls(*artifact_folders(store.root))
        for kind, name in contents.folders:
            contents._read(store, kind, name)
        # A link into the store is not touched, but the artifact behind it may be needed, and all it was made from.
        for path in contents.others:
            kind, _, other = path.partition("/")
            for name in [other] if other else store.root.child(kind).names():
                contents._read(store, kind, name)
        return contents

    def _read(self, store: Store, kind: str, name: str) -> None:
        folder = store.folder(kind, name)
        if folder.exists(MANIFEST_NAME):
            try:
                self.made[kind, name] = Artifact.read(folder).manifest
            except ManifestError as error:
                self.unreadable[kind, name] = str(error)


def roots(catalog: Catalog, keep_runs: int, running: bool) -> set[str]:
    """Fingerprints that stay with all they were made from: of registered versions and of each pipeline's last runs.

    With `running`, of every run that MLflow calls RUNNING as well: those that go on, and those that were killed.
    """
    kept: set[str] = set()
    seen: dict[str, int] = {}
    for run in runs.workflow_runs(catalog):
        name = run.data.tags["edt.workflow"]
        seen[name] = seen.get(name, 0) + 1
        if seen[name] <= keep_runs or (running and run.info.status == "RUNNING"):
            kept |= set(runs.steps_of(run.data.tags).values())
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


def survey(store: Store, catalog: Catalog, keep_runs: int, force: bool = False) -> Survey:
    """All that may go. Nothing is removed. What has no manifest counts as never finished.

    With `force` also what this MLflow does not know, and what cannot be read. Without it, raises UserError where MLflow
    knows none of the store's runs, or where something that is needed cannot be read.
    """
    contents = Contents.of(store)
    strangers = {} if force else unknown(store, catalog, contents)
    # A local store tells itself whether it is used; whatever MLflow calls RUNNING otherwise was killed.
    kept = roots(catalog, keep_runs, running=store.root.local is None)
    needed = reachable(contents.made, kept)
    if not force:
        _check_readable(contents, needed)
    # Another MLflow may have registered what this one does not know: what that was made from stays as well.
    needed_elsewhere = reachable(contents.made, kept | {name for _, name in strangers})
    found = Survey([], dict(contents.others))
    for identity in contents.folders:
        if identity[1] in needed:
            _attempts_given_up(store, contents, identity, found)
        elif reason := strangers.get(identity):
            found.left_alone["/".join(identity)] = f"{reason}; --force removes it"
        elif identity[1] not in needed_elsewhere:
            _not_needed(store, contents, identity, keep_runs, force, found)
    return found


def unknown(store: Store, catalog: Catalog, contents: Contents) -> dict[Identity, str]:
    """The artifacts that were made by runs that this MLflow does not know, and a text that says so.

    A run that was deleted in MLflow is known as long as MLflow keeps it. What names no run, as an artifact that was
    never finished, is looked up by its fingerprint. Raises UserError where not one of the runs is known.
    """
    named = {manifest.mlflow_run_id for manifest in contents.made.values() if manifest.mlflow_run_id}
    known = set(runs.runs_of(catalog, named))
    if named and not known:
        raise UserError(_nothing_known(store, catalog, len(named)))
    tagged = runs.search(catalog, "tags.`edt.fingerprint` LIKE '%'", deleted=True)
    fingerprints = {run.data.tags["edt.fingerprint"] for run in tagged}
    found = {}
    for identity in {*contents.folders, *contents.made}:
        run_id = contents.made[identity].mlflow_run_id if identity in contents.made else None
        if run_id not in known if run_id else identity[1] not in fingerprints:
            maker = f"made by the run {run_id}" if run_id else "made by a run"
            found[identity] = f"{maker} that the MLflow at {catalog.place} does not know"
    return found


def _nothing_known(store: Store, catalog: Catalog, number: int) -> str:
    root, remedy = store.root.local, "give the MLflow of these runs with --tracking-uri or MLFLOW_TRACKING_URI"
    if root is not None and (root / SQLITE).exists() and catalog.tracking_uri != own_uri(store.root):
        remedy += f", or neither for the one in the store ({root / SQLITE})"
    return (
        f"the MLflow at {catalog.place} knows none of the {number} runs that made the artifacts in {store.root.uri}, "
        f"so it cannot tell which of them a registered model needs; nothing was removed. Check its address: {remedy}. "
        "To remove artifacts that this MLflow does not know, give --force"
    )


def _check_readable(contents: Contents, needed: set[str]) -> None:
    """Raise UserError where the manifest of something that is needed cannot be read."""
    reasons = [reason for (_, name), reason in contents.unreadable.items() if name in needed]
    if reasons:
        raise UserError(
            f"{len(reasons)} artifacts that a registered model or a recent run needs have a manifest that cannot be "
            f"read, so it is not known what they were made from; nothing was removed. The first: {reasons[0]}. To "
            "remove what only these may need, give --force"
        )


def _attempts_given_up(store: Store, contents: Contents, identity: Identity, found: Survey) -> None:
    """Add the other attempts at an artifact that is committed. What has no manifest is continued by the next run."""
    manifest = contents.made.get(identity)
    if manifest is None or not manifest.attempt:
        return
    folder, path = store.folder(*identity), "/".join(identity)
    others = foreign_names(folder, manifest.attempt)
    found.left_alone.update({f"{path}/{name}": reason for name, reason in others.items()})
    for name in folder.names():
        if is_stamped(name) and name != manifest.attempt and name not in others:
            size = sum(files_below(folder.child(name)).values())
            found.garbage.append(Garbage(*identity, size, "another attempt was committed", name))


def _not_needed(
    store: Store, contents: Contents, identity: Identity, keep_runs: int, force: bool, found: Survey
) -> None:
    """Add an artifact that nothing needs: to what may go, or to what stays since it is not what edt has made."""
    folder, manifest = store.folder(*identity), contents.made.get(identity)
    why, run_id = f"no registered model and none of the last {keep_runs} runs needs it", None
    if identity in contents.unreadable:
        if not force:
            found.left_alone["/".join(identity)] = f"{why}, but {contents.unreadable[identity]}; --force removes it"
            return
        why = f"its manifest cannot be read, and {why}"
    elif manifest is None:
        why = f"never finished, and {why}"
    else:
        run_id = manifest.mlflow_run_id
    if reason := _not_of_edt(folder, manifest, identity):
        found.left_alone["/".join(identity)] = f"{why}, but {reason}"
    else:
        found.garbage.append(Garbage(*identity, sum(files_below(folder).values()), why, run_id=run_id))


def _not_of_edt(folder: Folder, manifest: Manifest | None, identity: Identity) -> str:
    """Why a folder is not, or not only, an artifact that a workflow has put there; "" where it is."""
    if manifest is not None and (manifest.kind, manifest.fingerprint) != identity:
        return f"its manifest is of the artifact {manifest.kind}/{manifest.fingerprint[:12]}: it was moved or copied"
    if not folder.names():
        return "it is empty"
    if others := foreign(folder, manifest):
        return f"it holds what is not of edt: {listing([f'{name} is {reason}' for name, reason in others.items()])}"
    return ""

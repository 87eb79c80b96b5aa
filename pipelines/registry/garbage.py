"""The garbage of a store: artifacts that no registered model and no recent run needs, and abandoned attempts.

A store in use is left alone: a workflow locks its store (`Store.in_use`) before it searches for artifacts and until it
ends. Artifacts that were made by a run of another MLflow, and files that are not artifacts, are left alone as well.
"""

import json
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
from jobs.models.initial import INIT_CHECKPOINT_TAG
from jobs.runtime.tracking import SQLITE, own_uri
from pipelines.registry.aliases import EVALUATIONS_TAG, GUIDE_CHECKPOINT_TAG, GUIDE_TAG, search
from pipelines.tracking import runs
from pipelines.tracking.catalog import Catalog

# Tags of a registered version that name artifacts it was made of.
_GUIDES = (GUIDE_TAG, GUIDE_CHECKPOINT_TAG)
_ROOT_TAGS = ("edt.checkpoint", "edt.evaluation", "edt.autoencoder", INIT_CHECKPOINT_TAG, *_GUIDES)


@dataclass(frozen=True)
class Garbage:
    """One folder to remove: an artifact with all its attempts, or, with `attempt`, only that attempt."""

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
class Lineage:
    """What registered versions keep in a store: the versions, their artifacts with all inputs, and the bytes."""

    versions: int = 0
    artifacts: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Survey:
    """The garbage of a store, and what is left alone although nothing needs it: path in the store -> why."""

    garbage: list[Garbage]
    left_alone: dict[str, str]
    lineage: Lineage = Lineage()


@dataclass
class Contents:
    """The contents of a store: artifact folders, other files (path -> why), manifests, and unreadable manifests."""

    folders: list[Identity]
    others: dict[str, str]
    manifests: dict[Identity, Manifest] = field(default_factory=dict)
    unreadable: dict[Identity, str] = field(default_factory=dict)  # -> the error

    @classmethod
    def of(cls, store: Store) -> "Contents":
        contents = cls(*artifact_folders(store.root))
        for kind, name in contents.folders:
            contents._read(store, kind, name)
        # A link in the store is never removed, but the artifact behind it, with its inputs, may be needed.
        for path in contents.others:
            kind, _, other = path.partition("/")
            for name in [other] if other else store.root.child(kind).names():
                contents._read(store, kind, name)
        return contents

    def _read(self, store: Store, kind: str, name: str) -> None:
        folder = store.folder(kind, name)
        if folder.exists(MANIFEST_NAME):
            try:
                self.manifests[kind, name] = Artifact.read(folder).manifest
            except ManifestError as error:
                self.unreadable[kind, name] = str(error)


def roots(catalog: Catalog, keep_runs: int, running: bool) -> set[str]:
    """Fingerprints of the artifacts to keep, with their inputs: of registered versions and each pipeline's last runs.

    With `running`, also of every run with the status RUNNING in MLflow: runs in progress, and runs that were killed.
    """
    fingerprints: set[str] = set()
    seen: dict[str, int] = {}
    for run in runs.workflow_runs(catalog):
        name = run.data.tags["edt.workflow"]
        seen[name] = seen.get(name, 0) + 1
        if seen[name] <= keep_runs or (running and run.info.status == "RUNNING"):
            fingerprints |= set(runs.steps_of(run.data.tags).values())
            fingerprints |= {tag for key, tag in run.data.tags.items() if key.startswith(f"{INIT_CHECKPOINT_TAG}.")}
            fingerprints |= {tag for key, tag in run.data.tags.items() if key == GUIDE_CHECKPOINT_TAG}
    return fingerprints.union(*registered_roots(catalog))


def registered_roots(catalog: Catalog) -> list[set[str]]:
    """For each registered version, the fingerprints of the artifacts that its tags name."""
    return [
        {version.tags[key] for key in _ROOT_TAGS if key in version.tags}
        | set(json.loads(version.tags.get(EVALUATIONS_TAG, "[]")))
        for version in search(catalog, "")
    ]


def reachable(manifests: Mapping[Identity, Manifest], fingerprints: Iterable[str]) -> set[str]:
    """The given fingerprints, those of the reports about them, and those of all their inputs."""
    by_fingerprint = {fingerprint: manifest for (_, fingerprint), manifest in manifests.items()}
    waiting, visited = list(fingerprints), set[str]()
    while waiting:
        identity = waiting.pop()
        if identity not in visited:
            visited.add(identity)
            if identity in by_fingerprint:
                waiting += by_fingerprint[identity].inputs.values()
        if not waiting:
            waiting += [
                fingerprint
                for (kind, fingerprint), manifest in manifests.items()
                if kind == "report" and fingerprint not in visited and _is_about(manifest, visited)
            ]
    return visited


def _is_about(report: Manifest, fingerprints: set[str]) -> bool:
    return all(report.inputs.get(role) in fingerprints for role in ("checkpoint", "evaluation"))


def lineage_size(contents: Contents, catalog: Catalog) -> Lineage:
    """How much the registered versions keep: their artifacts in this store, and all inputs of these."""
    fingerprints = {fingerprint for _, fingerprint in contents.manifests}
    versions = [roots for roots in registered_roots(catalog) if roots & fingerprints]
    needed = reachable(contents.manifests, set().union(*versions))
    manifests = [manifest for (_, fingerprint), manifest in contents.manifests.items() if fingerprint in needed]
    size = sum(entry.bytes for manifest in manifests for entry in manifest.files)
    return Lineage(len(versions), len(manifests), size)


def survey(store: Store, catalog: Catalog, keep_runs: int, force: bool = False) -> Survey:
    """Find the garbage of a store. Removes nothing. An artifact without a manifest counts as unfinished.

    With `force`, garbage includes artifacts that this MLflow does not know and those that are unreadable. Without it,
    raises UserError if MLflow knows none of the store's runs, or if an artifact that is needed is unreadable.
    """
    contents = Contents.of(store)
    foreign_artifacts = {} if force else unknown(store, catalog, contents)
    # A local store is locked while it is used, so there a run with the status RUNNING was killed.
    fingerprints = roots(catalog, keep_runs, running=store.root.local is None)
    needed = reachable(contents.manifests, fingerprints)
    if not force:
        _check_readable(contents, needed)
    # Another MLflow may have registered an artifact that this one does not know: keep its inputs as well.
    needed_elsewhere = reachable(contents.manifests, fingerprints | {name for _, name in foreign_artifacts})
    result = Survey([], dict(contents.others), lineage_size(contents, catalog))
    for identity in contents.folders:
        if identity[1] in needed:
            _add_abandoned_attempts(store, contents, identity, result)
        elif reason := foreign_artifacts.get(identity):
            result.left_alone["/".join(identity)] = f"{reason}; --force removes it"
        elif identity[1] not in needed_elsewhere:
            _add_unneeded(store, contents, identity, keep_runs, force, result)
    return result


def unknown(store: Store, catalog: Catalog, contents: Contents) -> dict[Identity, str]:
    """The artifacts of runs that this MLflow does not know, each with a text that says so.

    A run deleted in MLflow is known as long as MLflow keeps it. An artifact whose run is not recorded, as an unfinished
    one, is looked up by its fingerprint. Raises UserError if none of the runs is known.
    """
    manifests = contents.manifests
    run_ids = {manifest.mlflow_run_id for manifest in manifests.values() if manifest.mlflow_run_id}
    known_ids = set(runs.runs_of(catalog, run_ids))
    if run_ids and not known_ids:
        raise UserError(_no_run_known(store, catalog, len(run_ids)))
    tagged = runs.search(catalog, "tags.`edt.fingerprint` LIKE '%'", deleted=True)
    fingerprints = {run.data.tags["edt.fingerprint"] for run in tagged}
    reasons = {}
    for identity in {*contents.folders, *manifests}:
        run_id = manifests[identity].mlflow_run_id if identity in manifests else None
        if run_id not in known_ids if run_id else identity[1] not in fingerprints:
            origin = f"made by the run {run_id}" if run_id else "made by a run"
            reasons[identity] = f"{origin} that the MLflow at {catalog.place} does not know"
    return reasons


def _no_run_known(store: Store, catalog: Catalog, number: int) -> str:
    root, remedy = store.root.local, "give the MLflow of these runs with --tracking-uri or MLFLOW_TRACKING_URI"
    if root is not None and (root / SQLITE).exists() and catalog.tracking_uri != own_uri(store.root):
        remedy += f", or neither for the one in the store ({root / SQLITE})"
    return (
        f"the MLflow at {catalog.place} knows none of the {number} runs that made the artifacts in {store.root.uri}, "
        f"so it cannot tell which of them a registered model needs; nothing was removed. Check its address: {remedy}. "
        "To remove artifacts that this MLflow does not know, give --force"
    )


def _check_readable(contents: Contents, needed: set[str]) -> None:
    """Raise UserError if the manifest of an artifact that is needed cannot be read."""
    reasons = [reason for (_, name), reason in contents.unreadable.items() if name in needed]
    if reasons:
        raise UserError(
            f"{len(reasons)} artifacts that a registered model or a recent run needs have a manifest that cannot be "
            f"read, so their inputs are unknown; nothing was removed. The first: {reasons[0]}. To remove artifacts "
            "that only these may need, give --force"
        )


def _add_abandoned_attempts(store: Store, contents: Contents, identity: Identity, result: Survey) -> None:
    """Add the other attempts at a committed artifact. An uncommitted one is resumed by the next run, so it stays."""
    manifest = contents.manifests.get(identity)
    if manifest is None or not manifest.attempt:
        return
    folder, path = store.folder(*identity), "/".join(identity)
    others = foreign_names(folder, manifest.attempt)
    result.left_alone.update({f"{path}/{name}": reason for name, reason in others.items()})
    for name in folder.names():
        if is_stamped(name) and name != manifest.attempt and name not in others:
            size = sum(files_below(folder.child(name)).values())
            result.garbage.append(Garbage(*identity, size, "another attempt was committed", name))


def _add_unneeded(
    store: Store, contents: Contents, identity: Identity, keep_runs: int, force: bool, result: Survey
) -> None:
    """Add an artifact that nothing needs: to the garbage, or to what is left alone if edt did not make all of it."""
    folder, manifest = store.folder(*identity), contents.manifests.get(identity)
    why, run_id = f"no registered model and none of the last {keep_runs} runs needs it", None
    if identity in contents.unreadable:
        if not force:
            result.left_alone["/".join(identity)] = f"{why}, but {contents.unreadable[identity]}; --force removes it"
            return
        why = f"its manifest cannot be read, and {why}"
    elif manifest is None:
        why = f"never finished, and {why}"
    else:
        run_id = manifest.mlflow_run_id
    if reason := _not_of_edt(folder, manifest, identity):
        result.left_alone["/".join(identity)] = f"{why}, but {reason}"
    else:
        result.garbage.append(Garbage(*identity, sum(files_below(folder).values()), why, run_id=run_id))


def _not_of_edt(folder: Folder, manifest: Manifest | None, identity: Identity) -> str:
    """Why a folder is not, or not only, an artifact that a workflow wrote there; "" if it is."""
    if manifest is not None and (manifest.kind, manifest.fingerprint) != identity:
        return f"its manifest is of the artifact {manifest.kind}/{manifest.fingerprint[:12]}: it was moved or copied"
    if not folder.names():
        return "it is empty"
    if others := foreign(folder, manifest):
        return f"it contains other files: {listing([f'{name} is {reason}' for name, reason in others.items()])}"
    return ""

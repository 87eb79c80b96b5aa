"""Small artifacts with runs of their own, for what cleans a store: real files and manifests, no training."""

from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.manifest import fingerprint
from edt_core.store.store import Store
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import step_tag


def made(store: Store, catalog: Catalog | None, kind: str, number: int, **inputs: Artifact) -> Artifact:
    """An artifact as a workflow leaves it; without a catalog, one that names no run."""
    identities = {role: artifact.fingerprint for role, artifact in inputs.items()}
    identity = fingerprint(kind, 1, {"number": number}, identities)
    run = None if catalog is None else catalog.start_run(kind, {"edt.kind": kind, "edt.fingerprint": identity})
    out = store.writer(kind, identity)
    out.write_bytes("a.bin", bytes([number]))
    return out.commit({"number": number}, identities, {}, mlflow_run_id=run)


def chain(store: Store, catalog: Catalog | None, number: int) -> list[Artifact]:
    """Images, latents, a checkpoint, its evaluation, and a report of them."""
    images = made(store, catalog, "images", number)
    latents = made(store, catalog, "latents", number, images=images)
    checkpoint = made(store, catalog, "checkpoint", number, latents=latents)
    evaluation = made(store, catalog, "evaluation", number, checkpoint=checkpoint)
    report = made(store, catalog, "report", number, checkpoint=checkpoint, evaluation=evaluation)
    return [images, latents, checkpoint, evaluation, report]


def begun(store: Store, catalog: Catalog | None, kind: str, identity: str) -> ArtifactWriter:
    """An attempt that was not finished."""
    if catalog is not None:
        catalog.start_run(kind, {"edt.kind": kind, "edt.fingerprint": identity})
    out = store.writer(kind, identity)
    out.write_bytes("unit.bin", b"unit")
    return out


def run_about(catalog: Catalog, artifacts: list[Artifact], status: str = "FINISHED", name: str = "p") -> str:
    """A workflow run that names these artifacts as its steps'."""
    tags = {step_tag(artifact.manifest.kind): artifact.fingerprint for artifact in artifacts}
    run = catalog.start_run(name, {"edt.workflow": name, **tags})
    if status != "RUNNING":
        catalog.end_run(run, status)
    return run


def register(catalog: Catalog, run: str, artifacts: list[Artifact]) -> None:
    """A registered version, champion, of the checkpoint and the evaluation of a `chain`."""
    tags = {"edt.checkpoint": artifacts[2].fingerprint, "edt.evaluation": artifacts[3].fingerprint}
    catalog.client.create_registered_model("m")
    version = catalog.client.create_model_version("m", "file:///nowhere", run_id=run, tags=tags)
    catalog.client.set_registered_model_alias("m", "champion", version.version)


def there(store: Store) -> set[str]:
    """The fingerprints of what is whole in the store."""
    return {artifact.fingerprint for artifact in store.artifacts()}


def names(artifacts: list[Artifact]) -> set[str]:
    return {artifact.fingerprint for artifact in artifacts}

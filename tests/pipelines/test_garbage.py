"""gc removes what nothing reaches, and only that: small artifacts by hand, a real MLflow."""

import threading
from pathlib import Path

import pytest

from edt_core.artifact import Artifact
from edt_core.errors import UserError
from edt_core.manifest import fingerprint
from edt_core.schema import MANIFEST_NAME
from pipelines.artifacts import Store
from pipelines.catalog import Catalog
from pipelines.garbage import collect, remove, roots, survey
from pipelines.runs import step_tag
from tests.support.registry import write_empty_mlflow


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def catalog(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_empty_mlflow(tmp_path / "store")
    return Catalog.open(store.root, "gc")


def made(store: Store, kind: str, number: int, **inputs: Artifact) -> Artifact:
    identities = {role: artifact.fingerprint for role, artifact in inputs.items()}
    identity = fingerprint(kind, 1, {"number": number}, identities)
    out = store.writer(kind, identity)
    out.write_bytes("a.bin", bytes([number]))
    return out.commit({"number": number}, identities, {})


def chain(store: Store, number: int) -> list[Artifact]:
    """Images, latents, a checkpoint, its evaluation, and a report of them."""
    images = made(store, "images", number)
    latents = made(store, "latents", number, images=images)
    checkpoint = made(store, "checkpoint", number, latents=latents)
    evaluation = made(store, "evaluation", number, checkpoint=checkpoint)
    report = made(store, "report", number, checkpoint=checkpoint, evaluation=evaluation)
    return [images, latents, checkpoint, evaluation, report]


def run_about(catalog: Catalog, artifacts: list[Artifact], status: str = "FINISHED", name: str = "p") -> str:
    tags = {step_tag(artifact.manifest.kind): artifact.fingerprint for artifact in artifacts}
    run = catalog.start_run(name, {"edt.workflow": name, **tags})
    if status != "RUNNING":
        catalog.end_run(run, status)
    return run


def register(catalog: Catalog, run: str, checkpoint: Artifact, evaluation: Artifact) -> None:
    tags = {"edt.checkpoint": checkpoint.fingerprint, "edt.evaluation": evaluation.fingerprint}
    catalog.client.create_registered_model("m")
    catalog.client.create_model_version("m", "file:///nowhere", run_id=run, tags=tags)


def there(store: Store) -> set[str]:
    return {artifact.fingerprint for artifact in store.artifacts()}


def names(artifacts: list[Artifact]) -> set[str]:
    return {artifact.fingerprint for artifact in artifacts}


def test_what_the_last_runs_and_registered_models_reach_stays(store: Store, catalog: Catalog) -> None:
    registered, old, last, killed = (chain(store, number) for number in range(4))
    run = run_about(catalog, registered)
    register(catalog, run, registered[2], registered[3])
    run_about(catalog, old)
    run_about(catalog, killed, "RUNNING")
    run_about(catalog, last[3:], "FAILED")  # what they were made from is reached, not named
    other = chain(store, 9)
    run_about(catalog, other, name="another pipeline")
    told = collect(store, catalog, keep_runs=1, dry_run=True)
    assert {item.fingerprint for item in told} == names(old + killed)
    assert there(store) == names(registered + old + last + killed + other)
    assert collect(store, catalog, keep_runs=1, dry_run=False) == told
    assert there(store) == names(registered + last + other)
    assert roots(catalog, 1, running=True) >= names(killed)  # a remote store cannot tell killed from going on
    assert not any(store.folder(a.manifest.kind, a.fingerprint).names() for a in old)
    assert collect(store, catalog, keep_runs=1, dry_run=False) == []


def test_attempts_that_were_given_up_go_and_those_that_go_on_stay(store: Store, catalog: Catalog) -> None:
    artifacts = chain(store, 1)
    run_about(catalog, artifacts)
    images = artifacts[0]
    lost = store.writer("images", images.fingerprint)
    lost.write_bytes("half.bin", b"half")
    under_way, forgotten = "a" * 64, "b" * 64
    store.writer("features", under_way).write_bytes("unit.bin", b"unit")
    store.writer("features", forgotten).write_bytes("unit.bin", b"unit")
    catalog.end_run(catalog.start_run("p", {"edt.workflow": "p", step_tag("sample"): under_way}), "KILLED")
    found = collect(store, catalog, keep_runs=2, dry_run=False)
    assert {(item.fingerprint, item.attempt) for item in found} == {(images.fingerprint, lost.attempt), (forgotten, "")}
    assert store.begun("features", under_way) == {"unit.bin"}
    assert there(store) == names(artifacts)
    assert Artifact.open(images.folder).problems(deep=True) == []


def test_nothing_goes_while_a_run_uses_the_store(store: Store, catalog: Catalog) -> None:
    chain(store, 1)
    began, over = threading.Event(), threading.Event()

    def use() -> None:
        with store.in_use():
            began.set()
            over.wait()

    thread = threading.Thread(target=use)
    thread.start()
    try:
        assert began.wait(300)
        assert len(collect(store, catalog, keep_runs=1, dry_run=True)) == 5
        with pytest.raises(UserError, match="a run is going on in"):
            collect(store, catalog, keep_runs=1, dry_run=False)
        with store.in_use():  # two runs do not mind each other
            pass
    finally:
        over.set()
        thread.join()
    assert len(collect(store, catalog, keep_runs=1, dry_run=False)) == 5


def test_an_artifact_that_is_half_removed_is_none(
    store: Store, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a SIGKILL between the two: the manifest goes first, and the next gc takes the rest."""
    from edt_core.storage import Folder

    artifacts = chain(store, 1)
    found = survey(store, catalog, keep_runs=1)
    whole = Folder.remove

    def killed(self: Folder, name: str) -> None:
        whole(self, name)
        if name == MANIFEST_NAME:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(store, catalog, found)
    assert len(there(store)) == len(artifacts) - 1
    assert len(collect(store, catalog, keep_runs=1, dry_run=False)) == len(artifacts)
    assert there(store) == set()


def test_the_record_says_what_was_removed(store: Store, catalog: Catalog) -> None:
    run = catalog.start_run("step", {})
    out = store.writer("images", "c" * 64)
    out.write_bytes("a.bin", b"a")
    out.commit({}, {}, {}, mlflow_run_id=run)
    collect(store, catalog, keep_runs=1, dry_run=False)
    assert catalog.client.get_run(run).data.tags["edt.removed"]


def test_a_store_without_a_record_is_left_alone(tmp_path: Path) -> None:
    from edt_core.storage import Folder

    with pytest.raises(UserError, match="there is no MLflow record in the store"):
        Catalog.existing(Folder.at(tmp_path))

"""gc removes what nothing reaches, and only that: small artifacts by hand, a real MLflow."""

import threading
from pathlib import Path

import pytest

from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
from edt_core.store.store import Store
from pipelines.commands.gc import _show_removed
from pipelines.registry.cleaning import Plan, Request, collect, plan
from pipelines.registry.garbage import roots
from pipelines.setup.disk import size_text
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import step_tag
from tests.support.garbage import begun, chain, made, names, register, run_about, there
from tests.support.registry import write_empty_mlflow


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


@pytest.fixture
def catalog(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_empty_mlflow(tmp_path / "store")
    return Catalog.open(store.root, "gc")


def gc(store: Store, catalog: Catalog, keep_runs: int = 1) -> set[tuple[str, str]]:
    """What one `edt gc` removes: fingerprint and attempt."""
    return {(item.fingerprint, item.attempt) for item in collect(store, catalog, Request(keep_runs)).garbage}


def test_what_the_last_runs_and_registered_models_reach_stays(store: Store, catalog: Catalog) -> None:
    registered, old, last, killed = (chain(store, catalog, number) for number in range(4))
    run = run_about(catalog, registered)
    register(catalog, run, registered)
    run_about(catalog, old)
    run_about(catalog, killed, "RUNNING")
    run_about(catalog, last[3:], "FAILED")  # what they were made from is reached, not named
    other = chain(store, catalog, 9)
    run_about(catalog, other, name="another pipeline")
    planned = plan(store, catalog, Request(1)).garbage
    assert {item.fingerprint for item in planned} == names(old + killed)
    assert there(store) == names(registered + old + last + killed + other)
    assert collect(store, catalog, Request(1)).garbage == planned
    assert there(store) == names(registered + last + other)
    assert roots(catalog, 1, running=True) >= names(killed)  # a remote store cannot tell killed from going on
    assert not any(store.folder(a.manifest.kind, a.fingerprint).names() for a in old)
    assert gc(store, catalog) == set()


def test_attempts_that_were_given_up_go_and_those_that_go_on_stay(store: Store, catalog: Catalog) -> None:
    artifacts = chain(store, catalog, 1)
    run_about(catalog, artifacts)
    images = artifacts[0]
    lost = store.writer("images", images.fingerprint)
    lost.write_bytes("half.bin", b"half")
    under_way, forgotten = "a" * 64, "b" * 64
    begun(store, catalog, "features", under_way)
    begun(store, catalog, "features", forgotten)
    catalog.end_run(catalog.start_run("p", {"edt.workflow": "p", step_tag("sample"): under_way}), "KILLED")
    assert gc(store, catalog, keep_runs=2) == {(images.fingerprint, lost.attempt), (forgotten, "")}
    assert store.begun("features", under_way) == {"unit.bin"}
    assert there(store) == names(artifacts)
    assert Artifact.open(images.folder).problems(deep=True) == []


def test_nothing_goes_while_a_run_uses_the_store(store: Store, catalog: Catalog) -> None:
    chain(store, catalog, 1)
    began, over = threading.Event(), threading.Event()

    def use() -> None:
        with store.in_use():
            began.set()
            over.wait()

    thread = threading.Thread(target=use)
    thread.start()
    try:
        assert began.wait(300)
        assert len(plan(store, catalog, Request(1)).garbage) == 5
        with pytest.raises(UserError, match="a run is in progress in"):
            gc(store, catalog)
        with store.in_use():  # two runs do not mind each other
            pass
    finally:
        over.set()
        thread.join()
    assert len(gc(store, catalog)) == 5


def test_a_run_may_start_while_a_person_is_asked_and_what_it_needs_stays(store: Store, catalog: Catalog) -> None:
    artifacts = chain(store, catalog, 1)

    def agree(planned: Plan) -> None:
        assert len(planned.garbage) == 5
        with store.in_use():
            run_about(catalog, artifacts[:2])

    done = collect(store, catalog, Request(1), agree)
    assert {item.fingerprint for item in done.garbage} == names(artifacts[2:])
    assert there(store) == names(artifacts[:2])


def test_the_record_says_what_was_removed(store: Store, catalog: Catalog) -> None:
    images = made(store, catalog, "images", 1)
    assert gc(store, catalog) == {(images.fingerprint, "")}
    assert catalog.client.get_run(images.manifest.mlflow_run_id).data.tags["edt.removed"]


def test_a_store_without_a_record_is_left_alone(tmp_path: Path) -> None:
    from edt_core.store.folder import Folder

    with pytest.raises(UserError, match="there is no MLflow record in the store"):
        Catalog.existing(Folder.at(tmp_path))


def test_everything_a_registered_version_was_made_of_stays_and_its_size_is_stated(
    store: Store, catalog: Catalog, capsys: pytest.CaptureFixture[str]
) -> None:
    def of(kind: str, **inputs: Artifact) -> Artifact:
        return made(store, catalog, kind, 1, **inputs)

    images = of("images")
    vae, judge = of("autoencoder", images=images), of("classifier", images=images)
    latents = of("latents", images=images, autoencoder=vae)
    reference = of("reference", images=images, classifier=judge)
    checkpoint = of("checkpoint", latents=latents)
    features = of("features", checkpoint=checkpoint, autoencoder=vae, classifier=judge)
    evaluation = of("evaluation", features=features, reference=reference)
    lineage = [images, vae, judge, latents, reference, checkpoint, features, evaluation]
    newer = [made(store, catalog, kind, 2) for kind in ("images", "latents")]
    run = run_about(catalog, lineage)
    register(catalog, run, [images, latents, checkpoint, evaluation])
    run_about(catalog, newer)
    garbage = chain(store, catalog, 3)
    done = collect(store, catalog, Request(1))
    assert {item.fingerprint for item in done.garbage} == names(garbage)
    assert there(store) == names(lineage + newer)
    assert (done.lineage.versions, done.lineage.artifacts, done.lineage.bytes) == (1, 8, 8)
    _show_removed(done, as_json=False, listed=False)
    assert f"kept: 8 artifacts ({size_text(8)}) of the lineage of 1 registered version" in capsys.readouterr().out
    assert plan(store, catalog, Request(1)).lineage == done.lineage

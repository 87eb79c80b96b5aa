"""Networks of a registered version that a run keeps: their artifacts are inputs, and nothing is fitted again."""

import json
import shutil
from pathlib import Path

import pytest

from edt_core.errors import UserError
from edt_core.store.store import Store
from pipelines.commands.options import catalog_if_any
from pipelines.config.schema import PipelineConfig, load_config
from pipelines.diff import outline
from pipelines.outcome import Outcome
from pipelines.plan import PlannedStep, plan
from pipelines.registry.kept import autoencoder_of, classifier_of, kept_networks, recorded_networks
from pipelines.reproduce import restored
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import read_record
from tests.support.small import MODEL, SMALL, STEPS, copy_store, pipeline

pytestmark = pytest.mark.usefixtures("training_here")

KEPT = (f"autoencoder.pretrained=models:/{MODEL}@champion", f"classifier.pretrained=models:/{MODEL}/1")


@pytest.fixture
def copied(first: Outcome, store: Path, tmp_path: Path) -> Path:
    copy_store(store, tmp_path / "store")
    return tmp_path / "store"


def configured(store: Path, *assignments: str) -> PipelineConfig:
    return load_config("quickstart", [*SMALL, *assignments], str(store))


def planned(store: Path, *assignments: str) -> dict[str, PlannedStep]:
    return {step.step: step for step in plan(configured(store, *assignments), catalog_if_any(str(store)))}


def test_a_plan_keeps_the_networks_and_reuses_all_that_was_made_with_them(first: Outcome, store: Path) -> None:
    fitted, kept = planned(store), planned(store, *KEPT)
    assert {name: step.fingerprint for name, step in kept.items() if not name.startswith("report")} == {
        name: step.fingerprint for name, step in fitted.items() if not name.startswith("report")
    }
    for role in ("autoencoder", "classifier"):
        assert (kept[role].action, kept[role].run_id) == ("reuse", fitted[role].run_id)
        assert kept[role].why.startswith(f"of {MODEL} version 1, made ")


def test_other_images_keep_the_networks(first: Outcome, store: Path) -> None:
    fitted, kept = planned(store, "source.limit=380"), planned(store, *KEPT, "source.limit=380")
    for role in ("autoencoder", "classifier"):
        assert (fitted[role].action, kept[role].action) == ("run", "reuse")
    assert kept["encode"].action == "run"
    assert kept["encode"].fingerprint != fitted["encode"].fingerprint


def test_a_run_records_what_it_kept_and_is_reproduced_with_it(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = pipeline(copied, *KEPT)
    assert (outcome.executed, outcome.reused, outcome.failures) == (1, STEPS - 1, {})  # the report states the fields
    assert f"of {MODEL} version 1" in capsys.readouterr().out
    catalog = Catalog(outcome.tracking_uri, "")
    record = read_record(catalog, outcome.run_id)
    recorded = json.loads(record.tags["edt.kept.classifier"])
    assert recorded["fingerprint"] == record.steps["classifier"]  # by which `edt gc` keeps it
    _, published = restored(record, catalog, str(copied / "again"))
    assert {role: kept.item.fingerprint for role, kept in published.kept.items()} == {
        role: record.steps[role] for role in ("autoencoder", "classifier")
    }
    shutil.rmtree(copied / "classifier")
    with pytest.raises(UserError, match=f"kept the classifier of {MODEL} version 1, and its artifact is not usable"):
        recorded_networks(record.tags)


def test_what_is_gone_is_said_with_the_way_on(copied: Path, first: Outcome) -> None:
    catalog = catalog_if_any(str(copied))
    assert catalog is not None
    version, store = catalog.client.get_model_version(MODEL, "1"), Store.open(str(copied))
    config = configured(copied, *KEPT)
    assert set(kept_networks(config, catalog.tracking_uri, store)) == {"autoencoder", "classifier"}
    shutil.rmtree(copied / "autoencoder")
    assert autoencoder_of(version, store) is None  # and a run takes it from the registered folder
    assert set(kept_networks(config, catalog.tracking_uri, store)) == {"classifier"}
    (artifact,) = (copied / "classifier").iterdir()
    shutil.rmtree(artifact)
    with pytest.raises(UserError, match=r"cannot be kept: classifier/\w{12} is not in the store .*--from-scratch"):
        classifier_of(version, store)
    shutil.rmtree(copied / "features")
    with pytest.raises(UserError, match=r"its evaluation or its samples are not in the store .*--from-scratch"):
        classifier_of(version, store)
    with pytest.raises(UserError, match="has no MLflow record yet"):
        kept_networks(config, None, store)


def test_networks_that_do_not_fit_are_refused(first: Outcome, store: Path) -> None:
    opened, uri = Store.open(str(store)), first.tracking_uri
    ten = tuple("0123456789")
    kept_networks(configured(store, *KEPT), uri, opened, ten)
    for classes, said in [((*ten, "10"), "new: 10"), (ten[:9], "gone: 9"), (ten[::-1], "in another order")]:
        with pytest.raises(UserError, match=f"knows other classes than the images have .{said}"):
            kept_networks(configured(store, *KEPT), uri, opened, classes)
    with pytest.raises(UserError, match=r"has 16 dimensions, and classifier\.feature_dim is 8"):
        kept_networks(configured(store, *KEPT, "classifier.feature_dim=8"), uri, opened)
    with pytest.raises(UserError, match=r"has {'latent_channels': 4},"):
        kept_networks(configured(store, *KEPT, "autoencoder.latent_channels=8"), uri, opened)
    with pytest.raises(UserError, match=r"classifier\.pretrained"):
        configured(store, "classifier.pretrained=somewhere")


def test_a_comparison_of_configurations_sees_a_kept_classifier() -> None:
    fitted, kept = outline(load_config("quickstart")), outline(load_config("quickstart", KEPT[1:]))
    changed = {name for name in fitted if fitted[name] != kept[name]}
    assert {"classifier", "reference", f"sample {MODEL}"} <= changed
    assert not {"preprocess", "autoencoder", "encode", f"train {MODEL}"} & changed

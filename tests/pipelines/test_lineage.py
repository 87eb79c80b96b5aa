"""`edt lineage`: from a version back to the raw images, from MLflow alone and from manifests where runs are gone."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.store import Store
from pipelines.cli import app
from pipelines.registry.lineage import lineage
from pipelines.tracking.catalog import Catalog
from tests.support.registry import NAME, SOURCE, Registry

KINDS = ["images", "autoencoder", "latents", "checkpoint", "reference", "features", "evaluation"]
SET = ("source.kind=image_folder", "source.path=/data/birds")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry = Registry(tmp_path_factory.mktemp("lineage") / "store")
        registry.add("a", 5.0, assignments=SET)
        registry.add("b", 4.0, assignments=SET)
        yield registry


def artifacts(registry: Registry) -> dict[str, Artifact]:
    return {artifact.fingerprint: artifact for artifact in Store(Folder.at(registry.root)).artifacts()}


def test_every_artifact_behind_a_version_is_there_with_its_run_and_digest(registry: Registry) -> None:
    done = CliRunner().invoke(app, ["lineage", f"{NAME}@champion", "--json", *registry.arguments])
    found = json.loads(done.output)
    nodes, made = found["nodes"], artifacts(registry)
    assert found["root"] == f"{NAME}/2"
    assert sorted(node["kind"] for node in nodes.values()) == sorted([*KINDS, "model", "source"])
    for fingerprint, node in nodes.items():
        if node["kind"] not in ("model", "source"):
            manifest = made[fingerprint].manifest
            assert node["inputs"] == manifest.inputs
            assert (node["digest"], node["run"]) == (manifest.digest, manifest.mlflow_run_id)
            assert node["known_from"] == "mlflow"
    assert nodes[SOURCE]["uri"] == "image_folder /data/birds"
    (checkpoint,) = (node for node in nodes.values() if node["kind"] == "checkpoint")
    assert checkpoint["config"]["lr"] == "0.004"


def test_the_tree_names_each_artifact_once_and_what_is_not_by_default(registry: Registry) -> None:
    done = CliRunner().invoke(app, ["lineage", NAME, *registry.arguments])
    lines = done.output.splitlines()
    assert lines[0].startswith(f"model {NAME}/2")
    whole = [line for line in lines if "(above)" not in line]
    assert len(whole) == len(KINDS) + 2
    (checkpoint,) = (line for line in whole if line.split()[0] == "checkpoint")
    assert "max_steps=8" in checkpoint
    (source,) = (line for line in whole if line.split()[0] == "source")
    assert source.split() == ["source", SOURCE[:12], "image_folder", "/data/birds"]
    depths = {line.split()[0]: len(line) - len(line.lstrip()) for line in reversed(lines)}
    assert depths["evaluation"] < depths["features"] < depths["source"]


def test_a_store_that_is_gone_takes_nothing_from_it(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(registry.root / "mlflow.db", tmp_path / "mlflow.db")
    whole = lineage(registry.catalog, NAME)
    moved = registry.root.rename(registry.root.with_name("away"))
    try:
        alone = lineage(Catalog(f"sqlite:///{tmp_path / 'mlflow.db'}", ""), NAME)
    finally:
        moved.rename(registry.root)
    assert alone == whole


def test_runs_that_are_gone_are_made_up_for_by_manifests(registry: Registry, tmp_path: Path) -> None:
    """All runs deleted: only the version, and the store that it names, are left."""
    shutil.copy(registry.root / "mlflow.db", tmp_path / "mlflow.db")
    catalog = Catalog(f"sqlite:///{tmp_path / 'mlflow.db'}", "")
    whole = lineage(registry.catalog, NAME)
    gone = next(node for node in whole.nodes.values() if node.kind == "latents")
    for node in whole.nodes.values():
        if node.kind in ("latents", "images"):
            catalog.client.delete_run(node.run)
    found = lineage(catalog, NAME)
    assert found.nodes.keys() == whole.nodes.keys()
    assert found.nodes[gone.fingerprint].known_from == "manifest"
    for name, node in found.nodes.items():
        assert (node.inputs, node.digest, node.run) == (
            whole.nodes[name].inputs,
            whole.nodes[name].digest,
            whole.nodes[name].run,
        )
    assert any("from its manifest" in line for line in found.lines())


def test_what_nobody_knows_any_more_is_said(registry: Registry, tmp_path: Path) -> None:
    whole = lineage(registry.catalog, NAME)
    latents = next(node for node in whole.nodes.values() if node.kind == "latents")
    shutil.copy(registry.root / "mlflow.db", tmp_path / "mlflow.db")
    catalog = Catalog(f"sqlite:///{tmp_path / 'mlflow.db'}", "")
    catalog.client.delete_run(latents.run)
    folder = registry.root / "latents" / latents.fingerprint
    away = folder.rename(registry.root / "latents.away")
    try:
        found = lineage(catalog, NAME)
    finally:
        away.rename(folder)
    assert found.nodes[latents.fingerprint].known_from == "nothing"
    assert any("not recorded in MLflow" in line for line in found.lines())


def test_a_fingerprint_and_a_run_can_be_given_by_their_first_digits(registry: Registry) -> None:
    catalog, store = registry.catalog, Folder.at(registry.root)
    reference = next(item for item in artifacts(registry).values() if item.manifest.kind == "reference")
    for start in (reference.fingerprint[:12], reference.manifest.mlflow_run_id[:12]):  # type: ignore[index]
        assert lineage(catalog, start, store).root == reference.fingerprint
    with pytest.raises(UserError, match="no artifact and no step's run is meant by 0123456789ab"):
        lineage(catalog, "0123456789ab", store)
    assert Artifact.read(f"{registry.root}/reference/{reference.fingerprint[:12]}") == reference


def test_a_fingerprint_and_a_run_are_places_to_start(registry: Registry) -> None:
    whole = lineage(registry.catalog, NAME)
    features = next(node for node in whole.nodes.values() if node.kind == "features")
    assert features.run is not None
    for text in (features.fingerprint, features.run):
        found = lineage(registry.catalog, text)
        assert found.root == features.fingerprint
        assert found.nodes.items() <= whole.nodes.items()
        assert found.nodes[SOURCE].uri == "image_folder /data/birds"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("edt-smal", "did you mean edt-small"),
        ("0" * 64, "no artifact 0000"),
        ("0" * 32, "has no artifact"),
    ],
)
def test_what_has_no_lineage(registry: Registry, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lineage(registry.catalog, text)

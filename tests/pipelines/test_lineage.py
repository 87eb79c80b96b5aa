"""`edt lineage`: from a version back to the raw images, from MLflow alone and from manifests where runs are gone."""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
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
from pipelines.tracking.runs import read_record
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
    with pytest.raises(UserError, match="there is no registered model '0123456789ab'"):
        lineage(catalog, "0123456789ab", store)
    assert Artifact.read(f"{registry.root}/reference/{reference.fingerprint[:12]}") == reference


def test_a_fingerprint_and_a_run_are_places_to_start(registry: Registry) -> None:
    whole = lineage(registry.catalog, NAME)
    features = next(node for node in whole.nodes.values() if node.kind == "features")
    assert features.run is not None
    for text in (features.fingerprint, features.fingerprint[:12], features.run, features.run[:12]):
        found = lineage(registry.catalog, text)
        assert found.root == features.fingerprint
        assert found.nodes.items() <= whole.nodes.items()
        assert found.nodes[SOURCE].uri == "image_folder /data/birds"


def test_a_beginning_that_several_have_asks_for_more(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sorted(artifacts(registry))
    monkeypatch.setattr("edt_core.store.prefixes.PREFIX", re.compile("[0-9a-f]+"))
    monkeypatch.setattr("pipelines.registry.lineage.PREFIX", re.compile("[0-9a-f]+"))
    first = next(one[0] for one, other in pairwise(made) if one[0] == other[0])
    with pytest.raises(UserError, match=f"artifacts have a fingerprint that begins with {first}; give more digits"):
        lineage(registry.catalog, first, Folder.at(registry.root))


def test_the_run_of_an_artifact_is_found_among_the_runs(registry: Registry) -> None:
    artifact = next(iter(artifacts(registry).values()))
    step_run = artifact.manifest.mlflow_run_id
    assert step_run is not None
    parent = registry.catalog.client.get_run(step_run).data.tags["mlflow.parentRunId"]
    for text in (step_run, step_run[:12], parent, parent[:12]):
        done = CliRunner().invoke(app, ["runs", text, "--json", *registry.arguments])
        assert [row["run"] for row in json.loads(done.output)] == [parent], text
    assert CliRunner().invoke(app, ["runs", "0" * 32, *registry.arguments]).output.strip() == f"no runs of {'0' * 32}"
    with pytest.raises(UserError, match=f"it is a step of the run {parent}; give that one"):
        read_record(registry.catalog, step_run[:12])


def test_an_artifact_is_verified_by_the_beginning_of_its_fingerprint(registry: Registry) -> None:
    for fingerprint, artifact in artifacts(registry).items():
        kind = artifact.manifest.kind
        for text in (fingerprint[:12], f"{registry.root}/{kind}/{fingerprint[:12]}", artifact.folder.uri):
            done = CliRunner().invoke(app, ["verify", text, "--deep", *registry.arguments])
            assert done.output.startswith(f"{text}: {kind} {fingerprint[:12]}, "), done.output
            assert f"content digest {artifact.manifest.digest[:12]}" in done.output
    missing = CliRunner().invoke(app, ["verify", "0123456789ab", *registry.arguments]).exception
    assert isinstance(missing, UserError)
    assert "no finished artifact in" in str(missing)
    assert "begins with 0123456789ab; `edt artifacts` lists them" in str(missing)


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

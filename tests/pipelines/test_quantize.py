"""`edt quantize`: the candidate version, its record, and what can and cannot be done with it."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pytest
import torch

from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from jobs.models.initial import initial_source, named_model
from jobs.models.open import load_model, open_model
from jobs.models.registry_files import stored_problems
from pipelines.registry.aliases import set_tags
from pipelines.registry.gate import metric_of
from pipelines.registry.lookup import find, quantization_of
from pipelines.retrain.line import champion_record, record_of_version
from pipelines.tracking.catalog import Catalog
from tests.support.models import drawn_weights, opened
from tests.support.registry import REAL, Registry, registered
from tests.support.small import MODEL, copy_store, edt

if TYPE_CHECKING:
    from pipelines.outcome import Outcome


class Place:
    """A registered shallow model, and its quantised version 2, without metrics."""

    def __init__(self, folder: Path) -> None:
        self.registry = Registry(folder / "store")
        registered(self.registry, folder, opened(folder, drawn_weights()), torch_export=False)
        self.said = self.done("quantize", f"{REAL}@champion", *_QUICK, "--no-metric")

    def done(self, *arguments: str) -> str:
        """The output of `edt`, which must succeed."""
        result = edt(*arguments, *self.registry.arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def refusal(self, *arguments: str) -> str:
        """The one message of `edt`, which must refuse."""
        result = edt(*arguments, *self.registry.arguments)
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        return result.stderr

    def version(self, number: int = 2) -> Any:
        return find(self.registry.catalog, f"{REAL}/{number}")


_QUICK = ("--to", "int8-weights", "--samples", "4", "--calls", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return Place(tmp_path_factory.mktemp("place"))


def test_a_version_without_metrics_has_its_table_its_sizes_and_its_parents(place: Place) -> None:
    assert f"{REAL} version 2 is made from version 1\n" in place.said
    assert "it has no metrics, so no alias moved" in place.said
    version = place.version()
    facts = {key.removeprefix("edt.quantized."): value for key, value in version.tags.items() if "quantized." in key}
    assert (facts["of"], facts["scheme"]) == (f"{REAL}/1", "int8-weights")
    assert float(facts["mib"]) < 0.4 * float(facts["mib_before"])
    assert 0 < float(facts["worst_error"]) <= float(facts["keep_error"])
    assert min(float(facts["seconds"]), float(facts["seconds_before"])) > 0
    assert stored_problems(place.registry.catalog.client, version) == []
    assert "2" not in map(str, place.registry.catalog.client.get_registered_model(REAL).aliases.values())

    artifact, parent = Artifact.open(version.tags["edt.uri"]), place.version(1)
    assert artifact.fingerprint == version.tags["edt.checkpoint"]
    assert artifact.manifest.inputs == {"checkpoint": parent.tags["edt.checkpoint"]}
    table = artifact.counts["quantization"]["layers"]
    assert [row["worst"] for row in table] == sorted((row["worst"] for row in table), reverse=True)
    assert {row["stored"] for row in table} == {"quantised"}
    lineage = place.done("lineage", f"{REAL}/2")
    assert f"of={REAL}/1, scheme=int8-weights" in " ".join(lineage.split())
    assert f"checkpoint {parent.tags['edt.checkpoint'][:12]}" in lineage
    shown = place.done("models", "show", f"{REAL}/2")
    assert "quantised, not measured here" in shown
    assert "mib_before" in shown


def test_the_same_command_makes_no_second_version(place: Place) -> None:
    again = json.loads(place.done("quantize", f"{REAL}/1", *_QUICK, "--no-metric", "--json"))
    assert (again["version"], again["new"], again["decision"]) == (f"{REAL}/2", False, None)
    recorded = quantization_of(place.version())
    assert {name: again[name] for name in recorded} == recorded  # not the times of this call


def test_other_settings_leave_it_a_quantised_version(place: Place, tmp_path: Path) -> None:
    """A version of `edt models set-chain` has the weights of the one it is made from, so it needs torchao as well."""
    points = [{"name": "steps=2", "version": f"{REAL}/2", "settings": {"num_sampling_steps": 2}}]
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"version": f"{REAL}/2", "named": {}, "points": points}))
    made = json.loads(place.done("models", "set-chain", f"{REAL}/2", str(results), "--point", "steps=2", "--json"))
    number = int(made["version"].rpartition("/")[2])
    mlflow.set_tracking_uri(place.registry.catalog.tracking_uri)
    needed = Path(mlflow.artifacts.download_artifacts(f"models:/{made['version']}/requirements.txt")).read_text()
    assert "edt-pipeline[quantize]==" in needed
    facts, of = (quantization_of(place.version(each)) for each in (number, 2))
    assert facts == {name: text for name, text in of.items() if name not in ("seconds", "seconds_before", "timed_on")}
    shown = place.done("models", "show", made["version"])
    assert "with other sampling settings, not measured here" in shown
    assert "num_sampling_steps" in shown
    with pytest.raises(UserError, match=f"is quantised, and quantised weights cannot be trained; use {REAL}/1"):
        record_of_version(place.registry.catalog, place.version(number))
    refused = place.refusal("models", "promote", made["version"], "--force")
    assert f"made by `edt models set-chain` of {REAL}/2. Use it by its number" in refused


def test_a_dry_run_writes_nothing(place: Place) -> None:
    before = sorted(path.name for path in (place.registry.root / "checkpoint").iterdir())
    table = place.done("quantize", f"{REAL}/1", "--to", "int4-weights", "--samples", "4", "--calls", "1", "--dry-run")
    assert "feed-forward" in table
    assert "layers with smaller errors; 0 of 36 stay in float" in table
    assert sorted(path.name for path in (place.registry.root / "checkpoint").iterdir()) == before


def test_every_door_opens_the_same_model(place: Place, tmp_path: Path) -> None:
    registry = place.registry
    mlflow.set_tracking_uri(registry.catalog.tracking_uri)
    loaded, parent = load_model(f"{REAL}/2"), load_model(f"{REAL}/1")
    assert (loaded.classes, loaded.protocol) == (parent.classes, parent.protocol)
    x, t, y = torch.ones(2, 4, 8, 8), torch.tensor([9, 900]), torch.arange(2)
    with torch.no_grad():
        expected = loaded.model(x, t, y)
        error = (expected - parent.model(x, t, y)).norm() / expected.norm()
    assert 0 < error < 0.03
    checkpoint = open_model(f"{REAL}/2", Folder.at(tmp_path / "work")).checkpoint  # as `edt evaluate` opens it
    with torch.no_grad():
        assert torch.equal(load_model(checkpoint.folder.uri).model(x, t, y), expected)
        assert torch.equal(load_model(place.version().tags["edt.uri"]).model(x, t, y), expected)
    pyfunc = mlflow.pyfunc.load_model(f"models:/{REAL}/2")
    assert pyfunc.predict(np.array([0, 1]), params={"num_inference_steps": 2}).shape == (2, 32, 32, 3)
    drawn = ("sample", f"{REAL}/2", "--num", "1", "--num-sampling-steps", "2", "--out", str(tmp_path / "g.png"))
    assert "4 x 1 images of EDT-Tiny/2" in place.done(*drawn)
    place.done("models", "pull", f"{REAL}/2", str(tmp_path / "pulled"))
    card = (tmp_path / "pulled" / "README.md").read_text()
    assert "| quantised | int8 weights of 36 of 36 linear layers, by torchao" in card
    assert "| in float | embeddings, final layer |" in card
    assert "4 samples of seed 0, 2 of 3 calls of their chain" in card
    needed = Path(mlflow.artifacts.download_artifacts(f"models:/{REAL}/2/requirements.txt")).read_text()
    assert "edt-pipeline[quantize]==" in needed


def test_what_a_quantised_version_cannot_do_is_refused(place: Place, tmp_path: Path) -> None:
    catalog, label = place.registry.catalog, f"{REAL} version 2"
    assert "is quantised already (int8-weights)" in place.refusal("quantize", f"{REAL}/2", "--to", "int8")
    export = ("export", f"{REAL}/2", str(tmp_path / "p.pt2"), "--format", "torch-export")
    assert "would need torchao where it runs" in place.refusal(*export)
    with pytest.raises(UserError, match=r"train.init_from: models:/.*/2 is quantised \(int8-weights\), and quantised"):
        initial_source(TrainConfig(init_from=f"{REAL}/2"), catalog.tracking_uri)
    with pytest.raises(UserError, match=r"train\.init_from: .* is quantised"):
        initial_source(TrainConfig(init_from=place.version().tags["edt.uri"]), catalog.tracking_uri)
    guide = named_model(f"{REAL}/2", "sample.guide", catalog.tracking_uri)  # which is not trained
    assert guide.checkpoint == place.version().tags["edt.checkpoint"]
    with pytest.raises(UserError, match=f"{label} is quantised, and quantised weights cannot be trained; use {REAL}/1"):
        record_of_version(catalog, place.version())
    assert f"made by `edt quantize` of {REAL}/1 without metrics" in place.refusal("models", "promote", f"{REAL}/2")


def test_what_cannot_be_quantised_is_refused(place: Place) -> None:
    assert "--group-size is of int4-weights, but --to is int8" in place.refusal(
        "quantize", f"{REAL}/1", "--to", "int8", "--group-size", "16", "--no-metric"
    )
    assert "--group-size is 64, which does not divide the widths 80, 96, 160 (for example of blocks.1.attn.qkv)" in (
        place.refusal("quantize", f"{REAL}/1", "--to", "int4-weights", "--group-size", "64", "--no-metric")
    )
    assert "--keep-error is 1e-09, but the smallest error of a layer is" in place.refusal(
        "quantize", f"{REAL}/1", *_QUICK, "--keep-error", "1e-9", "--no-metric"
    )
    assert "--keep-error is inf; give a number" in place.refusal(
        "quantize", f"{REAL}/1", *_QUICK, "--keep-error", "inf"
    )
    features = place.registry.root / "features"
    moved = features.rename(features.with_name("moved"))
    try:
        lost = place.refusal("quantize", f"{REAL}/1", *_QUICK)
    finally:
        moved.rename(features)
    assert f"the evaluation of {REAL} version 1 cannot be repeated: its features" in lost
    assert "register the new version without metrics: --no-metric" in lost
    if not torch.cuda.is_available():
        assert "fp8 needs a GPU of compute capability 8.9" in place.refusal("quantize", f"{REAL}/1", "--to", "fp8")


def test_a_quantised_candidate_is_measured_as_its_parent_was(
    first: "Outcome", store: Path, tmp_path: Path, here: None
) -> None:
    copy_store(store, tmp_path / "store")
    options = ("--store", str(tmp_path / "store"))
    done = edt("quantize", f"{MODEL}/1", "--to", "int8", "--samples", "10", "--calls", "3", "--json", *options)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    number = facts["version"].rpartition("/")[2]
    catalog = Catalog.existing(Folder.at(tmp_path / "store"), None)
    version, parent = find(catalog, f"{MODEL}/{number}"), find(catalog, f"{MODEL}/1")
    assert version.tags["edt.protocol"] == parent.tags["edt.protocol"]  # so the two values can be compared
    assert version.tags["edt.gate"] == parent.tags["edt.gate"]
    value, before = (metric_of(each, "fd_classifier") for each in (version, parent))
    assert value is not None
    assert before is not None
    assert value != before
    assert value == pytest.approx(before, rel=0.1)
    assert facts["fd_classifier"] == f"{value:.4g}; {before:.4g} of version 1"
    assert "version 1 has" in facts["decision"]
    assert json.loads(version.tags["edt.decision"])["champion_before"] == "1"
    aliases = catalog.client.get_registered_model(MODEL).aliases
    assert str(aliases["candidate"]) == number
    assert stored_problems(catalog.client, version) == []
    lineage = edt("lineage", facts["version"], *options).stdout
    assert "from its manifest" not in lineage  # MLflow has every artifact
    listed = edt("gc", "--dry-run", *options).stdout
    assert version.tags["edt.checkpoint"][:12] not in listed

    catalog.client.set_registered_model_alias(MODEL, "champion", number)
    trained, record = champion_record(catalog, MODEL)  # a retraining starts from the weights in float
    assert trained is not None
    assert str(trained.version) == "1"
    assert record.run_id == parent.run_id
    set_tags(catalog, version, {"edt.quantized.of": f"{MODEL}/99"})
    with pytest.raises(UserError, match=f"quantised weights cannot be trained; use {MODEL}/99"):
        champion_record(catalog, MODEL)
    assert os.environ.get("MLFLOW_TRACKING_URI") is None

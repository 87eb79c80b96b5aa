"""`edt prune`: a shallower candidate of the champion, its record beside it, its lineage, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from edt_core.errors import UserError
from edt_core.models import ModelConfig
from edt_core.pipeline import EDTPipeline
from edt_core.store.folder import Folder
from edt_core.store.store import Store
from pipelines.config.schema import PipelineConfig
from pipelines.outcome import Outcome
from pipelines.registry.aliases import champion
from pipelines.registry.distilled.pruned_record import PrunedRecord
from pipelines.registry.gate import Decision
from pipelines.registry.lineage import lineage
from pipelines.reproduce import restored
from pipelines.retrain.prepare import Request as Retraining
from pipelines.retrain.prepare import _configured
from pipelines.retrain.prune import Request, prepare
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import read_record
from tests.support.pipelines import quiet
from tests.support.small import MODEL, copy_store, edt

TINY = ("--keep", "1:2", "--mask-steps", "2", "--train-steps", "3", "--set", "train.checkpoint_every=3")


@pytest.fixture(scope="module")
def place(first: Outcome, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a store with one version, the champion."""
    folder = tmp_path_factory.mktemp("prune") / "edt-store"
    copy_store(store, folder)
    return folder


@pytest.fixture(scope="module")
def pruned(place: Path) -> dict[str, Any]:
    """The outcome of `edt prune`, as JSON."""
    from tests.support.local_ray import local_ray_train

    with local_ray_train():
        done = edt("prune", f"{MODEL}@champion", *TINY, "--store", str(place), "--json")
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


def catalog_of(place: Path) -> Catalog:
    return Catalog.open(Folder.at(place), "test")


def test_a_shallower_version_is_registered_beside_the_values_before_the_cut(
    pruned: dict[str, Any], place: Path
) -> None:
    """The model before the cut was measured by its own run: its values are reused, and nothing of it runs again."""
    assert pruned["failures"] == {}
    assert pruned["executed"] == len({"prune", "train", "sample", "evaluate", "report"})
    catalog = catalog_of(place)
    version, before = (catalog.client.get_model_version(MODEL, number) for number in ("2", "1"))
    record = PrunedRecord.of(version)
    assert record is not None
    assert (record.location, record.keep, record.blocks) == (f"models:/{MODEL}/1", (1, 2), 7)
    assert len(record.kept_blocks) == 5
    assert set(record.kept_blocks) >= {2, 3, 4}, "stages of one block keep it"
    assert record.evaluation == before.tags["edt.evaluation"]
    assert record.metrics["fd_classifier"] == float(before.tags["edt.metric.fd_classifier"])
    for values, cost in ((record.parameters, "parameters"), (record.macs, "macs")):
        assert values == (int(before.tags[f"edt.cost.{cost}"]), int(version.tags[f"edt.cost.{cost}"]))
        assert values[1] < values[0]
    assert min(record.seconds) > 0
    assert record.loss is not None
    assert json.loads(version.tags["edt.model_overrides"]) == {"depths": [1, 1, 1, 1, 1]}
    decision = Decision.from_json(version.tags["edt.decision"])
    assert decision.champion_before == "1", "the gate compares it with the champion, as any candidate"
    page = Path(pruned["models"][MODEL]["report"]).read_text()
    assert "Before its blocks were cut" in page
    assert "5 of 7, 1 of each 2: " in page
    assert "metrics_before" in edt("models", "show", f"{MODEL}/2", "--store", str(place)).stdout
    shown = edt("models", "show", f"{MODEL}/2", "--store", str(place), "--json")
    assert json.loads(shown.stdout)["pruned"]["blocks"].startswith("5 of 7, 1 of each 2: ")


def test_kept_weights_are_those_of_the_version_and_the_folder_is_an_ordinary_one(
    pruned: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    record = read_record(catalog_of(place), pruned["run_id"])
    step = Store.open(str(place)).find("checkpoint", record.steps[f"prune.{MODEL}"])
    assert step is not None
    facts, shape = step.counts["pruned"], ModelConfig.from_dict(step.read_json("pruned/model_config.json"))
    assert shape.num_blocks == len(facts["kept_blocks"]) == 5
    assert [sum(group["importance"]) for group in facts["groups"]] == pytest.approx([1.0] * 5)
    pulled = edt("models", "pull", f"{MODEL}/2", str(tmp_path / "model"), "--store", str(place))
    assert pulled.returncode == 0, pulled.stderr
    images: Any = quiet(EDTPipeline.from_pretrained(tmp_path / "model"))([0, 1], output_type="pt", return_dict=False)
    assert images[0].shape == (2, 3, 32, 32)


def test_lineage_leads_through_the_cut_to_the_version(pruned: dict[str, Any], place: Path) -> None:
    catalog = catalog_of(place)
    before = catalog.client.get_model_version(MODEL, "1").tags["edt.checkpoint"]
    after = catalog.client.get_model_version(MODEL, "2").tags["edt.checkpoint"]
    nodes = lineage(catalog, f"{MODEL}/2", Folder.at(place)).nodes
    cut = nodes[nodes[after].inputs["init"]]
    assert cut.kind == "checkpoint"
    start = nodes[cut.inputs["init"]]
    assert (start.uri, start.inputs) == (f"models:/{MODEL}/1", {"checkpoint": before})


@pytest.mark.usefixtures("training_here")
def test_a_second_run_reuses_everything_and_a_restored_one_prunes(
    pruned: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    plan = edt("prune", f"{MODEL}/1", *TINY, "--store", str(place), "--plan", "--json")
    assert plan.returncode == 0, plan.stderr
    facts = json.loads(plan.stdout)
    assert {step["action"] for step in facts["steps"]} == {"reuse"}
    assert facts["blocks"] == [7, 5]
    record = PrunedRecord.of(catalog_of(place).client.get_model_version(MODEL, "2"))
    assert record is not None
    assert (facts["parameters"], facts["macs"]) == (list(record.parameters), list(record.macs))
    catalog = catalog_of(place)
    config, _ = restored(read_record(catalog, pruned["run_id"]), catalog, str(tmp_path / "again"))
    assert config.prune.keep == (1, 2)


def test_a_pruned_champion_is_retrained_as_it_is(pruned: dict[str, Any], place: Path) -> None:
    catalog = catalog_of(place)
    version = catalog.client.get_model_version(MODEL, "2")
    record = read_record(catalog, version.run_id)
    config = _configured(catalog, Retraining(MODEL, str(place)), version, record)
    assert config.prune.keep is None
    assert config.train.init_from == f"models:/{MODEL}/2"
    assert config.model_of(MODEL, 2).num_blocks == 5
    again = _configured(catalog, Retraining(MODEL, str(place), from_scratch=True), version, record)
    assert (again.prune.keep, again.train.init_from) == (None, None)
    assert again.model_of(MODEL, 2).num_blocks == 7


def test_what_cannot_be_pruned_is_refused(first: Outcome, pruned: dict[str, Any], place: Path) -> None:
    catalog = catalog_of(place)
    assert champion(catalog, MODEL) is not None
    with pytest.raises(UserError, match=r"leaves nothing out of EDT-Tiny/2"):
        prepare(catalog, Request(f"{MODEL}/2", str(place), (1, 2)))
    with pytest.raises(UserError, match=r"not with --set prune\.keep"):
        prepare(catalog, Request(f"{MODEL}/1", str(place), (1, 2), assignments=("prune.keep=[2,3]",)))
    for assignment, problem in (
        ("models={a: {}, b: {}}", "--set makes the models a, b, but one model is pruned"),
        (f"train.init_from=models:/{MODEL}/2", f"train.init_from is models:/{MODEL}/2, but {MODEL}/1 is pruned"),
    ):
        with pytest.raises(UserError, match=problem):
            prepare(catalog, Request(f"{MODEL}/1", str(place), (1, 2), assignments=(assignment,)))
    for text, problem in (("2:2", "N must be at least 1 and below M"), ("half", "give N:M")):
        done = edt("prune", MODEL, "--keep", text, "--store", str(place))
        assert done.returncode == 2
        assert problem in " ".join(done.stderr.split())


def test_a_rate_for_few_parameters_is_not_one_for_all(
    first: Outcome, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_of = PipelineConfig.train_of
    few = {"trainable": "bias", "lr": 0.04}
    monkeypatch.setattr(PipelineConfig, "train_of", lambda run, name: train_of(run, name).model_copy(update=few))
    with pytest.raises(UserError, match=r"trainable bias, at a rate of 0\.04 .* --set train\.lr=0\.002"):
        prepare(catalog_of(place), Request(f"{MODEL}/1", str(place), (1, 2)))


def test_a_placement_of_amm_moves_and_is_measured_where_it_was(first: Outcome, place: Path) -> None:
    """The published placement is one of numbers; a part of the model is found again by its name."""
    catalog, version = catalog_of(place), f"{MODEL}/1"
    pruning = prepare(catalog, Request(version, str(place), (1, 2), assignments=("sample.amm_blocks=decoder",)))
    assert pruning.config.sample.amm_blocks == "decoder"
    values = {**read_record(catalog, catalog.client.get_model_version(MODEL, "1").run_id).config, "store": str(place)}
    values["sample"] = {**values["sample"], "amm_blocks": [1, 5]}
    from pipelines.retrain.prune import _amm

    run = PipelineConfig.model_validate(values)
    assert _amm(run, pruning.before, pruning.after) == ({"amm_blocks": (0, 4)}, {"uncut_amm_blocks": (1, 5)})


def test_a_configuration_names_what_it_prunes() -> None:
    with pytest.raises(ValueError, match=r"train\.prune is \[1, 2\] for m, .* use `edt prune`"):
        PipelineConfig.model_validate(_values(train={"prune": [1, 2], "masked_loss": False}))
    with pytest.raises(ValueError, match=r"prune\.keep is \[1, 2\], but train\.init_from is null for m"):
        PipelineConfig.model_validate(_values(prune={"keep": [1, 2]}, train={"masked_loss": False}))


def _values(**sections: Any) -> dict[str, Any]:
    return {"name": "p", "source": {"kind": "digits"}, "models": {"m": {"model": "DiT-S/2"}}, **sections}

"""`edt ema`: errors by width, the model of a width, and its version in the registry."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from edt_core.config import SampleConfig, TrainConfig, result_fields
from edt_core.errors import UserError
from edt_core.evaluation.config import EvaluateConfig
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from jobs.commands.evaluate_model import make_parser
from jobs.commands.options import given_fields, validated
from jobs.models.initial import initial_source
from jobs.models.open import load_model
from jobs.models.registry_files import stored_problems
from pipelines.cli import app
from pipelines.registry.derived.measuring import measuring_command
from pipelines.registry.lookup import find
from tests.support.models import made_model, opened
from tests.support.posthoc import WIDTHS, with_snapshots
from tests.support.registry import REAL, Registry, registered


class Place:
    """A registered model whose training has snapshots, and the average of width 0.08 that was tracked."""

    def __init__(self, folder: Path) -> None:
        self.registry, model = Registry(folder / "store"), made_model()
        of_model = opened(folder, model)
        store = Folder.at(self.registry.root)
        self.training, self.expected = with_snapshots(of_model, model, store)
        registered(self.registry, folder, replace(of_model, checkpoint=self.training))

    def said(self, *arguments: str) -> str:
        done = CliRunner().invoke(app, [*arguments, *self.registry.arguments])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return Place(tmp_path_factory.mktemp("place"))


def test_errors_are_listed_by_width(place: Place) -> None:
    rows = {row["std"]: row for row in json.loads(place.said("ema", f"{REAL}@champion", "--json"))}
    assert all(rows[width]["error"] == pytest.approx(0, abs=1e-6) for width in WIDTHS)
    assert rows[0.07]["error"] == pytest.approx(0.0091, abs=1e-4)
    assert [width for width, row in rows.items() if row["refused"]] == [0.02]
    table = place.said("ema", f"{REAL}@champion")
    assert re.search(r"0\.15 +2\.21% +x 0\.95", table)
    assert "20.50% (refused)" in table
    with pytest.raises(UserError, match="--std is missing"):
        place.said("ema", REAL, "--register")


def test_a_version_s_average_is_a_version_with_its_lineage(place: Place, tmp_path: Path) -> None:
    out, registry = tmp_path / "wide", place.registry
    text = place.said("ema", f"{REAL}@champion", str(out), "--std", "0.08", "--register")
    assert "width 0.08 from 20 snapshots" in text
    assert f"{REAL} version 2 is made from version 1" in text
    measuring = f"edt evaluate {REAL}/1 ./{REAL}-averages --sweep ema=off,0.08"
    assert f"no candidate and no alias moved. To compare the two by one protocol:\n  {measuring}" in text
    version = find(registry.catalog, f"{REAL}/2")
    assert version.tags["edt.ema_std"] == "0.08"
    assert version.tags["edt.ema_of"] == f"{REAL}/1"
    assert version.tags["edt.checkpoint"] == place.training.fingerprint
    assert stored_problems(registry.catalog.client, version) == []
    aliases = registry.catalog.client.get_registered_model(REAL).aliases
    assert "2" not in map(str, aliases.values())

    made, parent = load_model(f"{REAL}/2"), load_model(f"{REAL}/1")
    assert (made.classes, made.protocol, made.num_timesteps) == (parent.classes, parent.protocol, 1000)
    weights, before = made.model.state_dict(), parent.model.state_dict()
    for name, value in place.expected.items():  # within the error of the profile, of weights that grow evenly
        assert (weights[name] - value).norm() < 0.01 * value.norm() + 1e-6, name
        assert not torch.equal(weights[name], before[name])
    assert all(torch.equal(weights[name], before[name]) for name in weights.keys() - place.expected.keys())
    assert "registered before" in place.said("ema", f"{REAL}/1", str(out), "--std", "0.08", "--register")

    lineage = place.said("lineage", f"{REAL}/2")
    assert "ema_std=0.08" in lineage
    assert f"checkpoint {place.training.fingerprint[:12]}" in lineage
    shown = place.said("models", "show", f"{REAL}/2")
    assert "averaged from snapshots, not measured here" in shown
    assert f"{REAL}/1" in shown
    with pytest.raises(UserError, match=rf"by `edt ema`. Compare .*edt evaluate {REAL}/1 OUT --sweep ema=off,0.08"):
        place.said("models", "promote", f"{REAL}/2")
    keep = TrainConfig(init_from=f"{REAL}/2", init_optimizer="keep")  # its training has other weights
    with pytest.raises(UserError, match="has averaged weights that `edt ema` made, and neither raw weights nor"):
        initial_source(keep, registry.catalog.tracking_uri)
    drawn = place.said("sample", str(out), "--num", "1", "--num-sampling-steps", "2", "--out", str(tmp_path / "g.png"))
    assert "4 x 1 images of EDT-Tiny/2" in drawn


def test_the_command_that_measures_an_average_has_the_protocol_of_its_parent(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "a store")
    classifier = registry.artifact("classifier", {"c": b"c"}, {}, {})
    sampling = SampleConfig(sampler="euler", num_samples=40, amm_blocks=(1, 2), guidance_interval=(0.25, 0.5), seed=3)
    networks = {"classifier": classifier, "inception": "i" * 64}
    features = registry.artifact("features", {"f": b"f"}, result_fields(sampling), networks)
    reference = registry.artifact("reference", {"r": b"r"}, {}, {})
    measured = EvaluateConfig(metrics=("fid",))
    inputs = {"features": features, "reference": reference}
    evaluation = registry.artifact("evaluation", {"m": b"m"}, result_fields(measured), inputs)
    parent = SimpleNamespace(name="m", version=3, tags={"edt.evaluation.uri": evaluation.folder.uri})

    program, verb, *arguments = shlex.split(measuring_command(parent, 0.08))
    options = make_parser("edt evaluate").parse_args(arguments)
    assert (program, verb, options.model, options.sweep) == ("edt", "evaluate", "m/3", ["ema=off,0.08"])
    assert validated(SampleConfig, given_fields(options, SampleConfig)) == sampling
    assert validated(EvaluateConfig, given_fields(options, EvaluateConfig)) == measured
    assert Artifact.open(options.reference).fingerprint == reference.fingerprint
    assert Artifact.open(options.classifier).fingerprint == classifier.fingerprint
    assert options.inception == "W"
    parent.tags = {}
    assert measuring_command(parent, 0.08) == "edt evaluate m/3 ./m-averages --sweep ema=off,0.08"


def test_an_artifact_is_a_training_too_and_has_no_version(place: Place, tmp_path: Path) -> None:
    text = place.said("ema", place.training.folder.uri, str(tmp_path / "wide"), "--std", "0.15")
    assert "error of the profile 2.21%" in text
    assert Artifact.open(str(tmp_path / "wide")).counts["ema_std"] == 0.15
    facts = json.loads(place.said("ema", place.training.folder.uri, str(tmp_path / "wide"), "--std", "0.15", "--json"))
    assert facts == {
        "folder": str(tmp_path / "wide"),
        "std": 0.15,
        "error": pytest.approx(0.0221, abs=1e-4),
        "version": None,
    }
    with pytest.raises(UserError, match="--register needs a registered model"):
        place.said("ema", place.training.folder.uri, str(tmp_path / "wide"), "--std", "0.15", "--register")
    doubtful = place.said("ema", place.training.folder.uri, str(tmp_path / "narrow"), "--std", "0.03")
    assert "0.03 is far from the widths of the snapshots (0.05, 0.1)" in doubtful


def test_a_version_whose_training_is_gone_says_where_it_was(place: Place, tmp_path: Path) -> None:
    folder = Path(place.training.folder.uri)
    moved = Path(shutil.move(folder, tmp_path / "moved"))
    try:
        with pytest.raises(UserError, match=rf"is not at {folder} as it was registered"):
            place.said("ema", f"{REAL}@champion")
    finally:
        shutil.move(moved, folder)

"""Retraining: the configuration of the champion's run with other images, and the champion's networks and weights."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from edt_core.config import PreprocessConfig, SourceConfig
from edt_core.data.digits import write_digits
from edt_core.data.sources.delta import ImageDelta
from edt_core.errors import UserError
from edt_core.progress import Silent
from edt_core.store.folder import Folder
from edt_core.store.manifest import ManifestError
from edt_core.store.store import Store
from jobs.stages import preprocess
from jobs.stages.preprocess import image_source
from pipelines.cli import app
from pipelines.config.schema import PipelineConfig, as_yaml, load_config
from pipelines.pipeline import HeldBackError
from pipelines.registry.aliases import DECISION_TAG
from pipelines.retrain import drift, prepare
from pipelines.retrain import line as lines
from pipelines.retrain.delta import delta_of
from pipelines.retrain.drift import DriftGuard, drift_guard
from pipelines.retrain.guard import guarded, over_limit
from pipelines.retrain.line import champion_record, has_ended
from pipelines.retrain.prepare import Request, _check_start, _configured, _with_rate
from pipelines.schedule.record import new_schedule
from pipelines.schedule.server import command
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import Record
from tests.support.local_ray import local_ray
from tests.support.registry import NAME, Registry
from tests.support.small import MODEL, pipeline

RUN = "0" * 31


class Version:
    """What a retraining reads of a version."""

    def __init__(self, number: int, **tags: str) -> None:
        self.name, self.version, self.run_id = "m", str(number), f"{RUN}{number}"
        self.tags = {"edt.source": "s" * 64, **tags}


class Line:
    """A line of versions, each with the record of its run, in the place of MLflow."""

    def __init__(self, patch: pytest.MonkeyPatch, store: Path) -> None:
        self.versions: dict[str, Version] = {}
        self.records: dict[str, Record] = {}
        self.store = str(store)
        patch.setattr(lines, "version_at", lambda catalog, name, number: self.versions.get(number))
        patch.setattr(lines, "read_record", lambda catalog, run_id: self.records[run_id])

    def add(self, *assignments: str, tags: Mapping[str, str] | None = None, **recorded: str) -> None:
        number = len(self.versions) + 1
        version = self.versions[str(number)] = Version(number, **recorded)
        config = load_config("quickstart", ["models={m: {}}", *assignments])
        values = config.model_dump(mode="json")
        self.records[version.run_id] = Record(version.run_id, "FINISHED", tags or {}, values, {})

    def config(self, *assignments: str, **request: Any) -> PipelineConfig:
        number = str(len(self.versions))
        asked = Request("m", self.store, assignments=assignments, **request)
        version = self.versions[number]
        return _configured(None, asked, version, self.records[version.run_id])  # type: ignore[arg-type]


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Line:
    return Line(monkeypatch, tmp_path)


def test_it_starts_from_the_champion_with_its_networks_and_a_quarter_of_its_steps(line: Line) -> None:
    line.add("train.max_steps=1000", "train.warmup_steps=900", "train.max_epochs=50", "train.lr=0.5", "train.seed=3")
    config = line.config()
    train = config.train_of("m")
    assert config.autoencoder.pretrained == config.classifier.pretrained == train.init_from == "models:/m/1"
    assert (train.max_steps, train.max_epochs, train.warmup_steps) == (250, None, 62)
    assert (train.lr, train.seed, config.store) == (0.125, 3, line.store)
    assert list(config.models) == ["m"]


def test_a_quarter_is_of_the_training_from_scratch_however_long_the_line(line: Line) -> None:
    line.add("models={m: {max_steps: 1000}}", **{"edt.cost.steps": "801"})  # it was stopped by its hours
    for number in (1, 2):
        line.add("train.max_steps=201", f"train.init_from=models:/m/{number}", "classifier.pretrained=models:/m/1")
    config = line.config()
    assert (config.train_of("m").max_steps, config.train_of("m").init_from) == (201, "models:/m/3")
    assert line.config(steps=7).train_of("m").max_steps == 7
    assert line.config("train.max_steps=9").train_of("m").max_steps == 9


def test_from_scratch_everything_is_fitted_and_trained_as_the_first_was(line: Line) -> None:
    line.add("train.max_steps=1000")
    line.add("train.max_steps=250", "train.init_from=models:/m/1", "autoencoder.pretrained=models:/m/1", "train.lr=0.5")
    config = line.config(from_scratch=True)
    assert (config.autoencoder.pretrained, config.classifier.pretrained) == (None, None)
    assert (config.train_of("m").max_steps, config.train_of("m").init_from) == (1000, None)
    assert line.config(from_scratch=True, steps=5).train_of("m").max_steps == 5


def test_a_line_whose_beginning_is_gone_keeps_its_steps(line: Line) -> None:
    """A quarter of a quarter, and so on, would end at one step; from scratch nobody knows the number."""
    line.add("train.max_steps=1000")
    line.add("train.max_steps=250", "train.init_from=models:/m/1")
    line.versions["1"].run_id = ""  # its run was deleted
    assert (line.config().train_of("m").max_steps, line.config().train_of("m").lr) == (250, 4.0e-3)
    with pytest.raises(UserError, match=r"number of steps is not known\. Set it with --steps"):
        line.config(from_scratch=True)
    assert line.config(from_scratch=True, steps=1000).train_of("m").max_steps == 1000


def test_new_classes_are_trained_at_the_whole_learning_rate(line: Line) -> None:
    line.add("train.lr=0.5")
    first, asked = line.records[line.versions["1"].run_id], Request("m", line.store)
    delta = ImageDelta(4, 7, 4, added={"elk": 3}, gained=("elk",))
    config, notes = _with_rate(line.config(), asked, delta, first)
    assert config.train_of("m").lr == 0.5
    assert notes == ["new classes (1): the learning rate is 0.5, that of the training from scratch"]
    config, notes = _with_rate(line.config(), asked, replace(delta, gained=()), first)
    assert (config.train_of("m").lr, notes) == (0.125, [])
    set_by_hand = replace(asked, assignments=("train.lr=0.1",))
    config, notes = _with_rate(line.config("train.lr=0.1"), set_by_hand, delta, first)
    assert (config.train_of("m").lr, notes) == (0.1, [])


def test_a_line_that_began_with_another_model_keeps_its_learning_rate(line: Line) -> None:
    line.add("train.lr=0.5", "train.init_from=published.pt")
    first = line.records[line.versions["1"].run_id]
    delta = ImageDelta(4, 7, 4, added={"elk": 3}, gained=("elk",))
    config, notes = _with_rate(line.config(), Request("m", line.store), delta, first)
    assert (config.train_of("m").lr, notes) == (0.5, [])


def test_an_alias_in_the_record_is_the_version_that_it_named(line: Line) -> None:
    line.add("train.max_steps=1000")
    line.add("train.max_steps=250", "train.init_from=m@champion", tags={"edt.init_from.m": "models:/m/1"})
    assert line.config().train_of("m").max_steps == 250


def test_limits_that_were_set_for_one_run_are_not_inherited(line: Line) -> None:
    line.add("retrain.max_drift=5", "notify.events=[failed]")
    line.add("train.init_from=models:/m/1")
    config = line.config()
    assert (config.retrain.max_drift, config.notify.events) == (5, ("failed",))
    assert line.config("retrain.max_drift=null").retrain.max_drift is None


@pytest.mark.parametrize("ended", [True, False])
def test_a_champion_whose_run_did_not_end_is_finished_first(
    line: Line, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """With the images of the champion there is nothing to train, but a decision or a report may be missing."""
    monkeypatch.setattr(prepare, "has_ended", lambda *_: ended)
    line.add("train.max_steps=1000")
    line.add("train.max_steps=250", "train.init_from=models:/m/1")
    version = line.versions["2"]
    source = SimpleNamespace(fingerprint=version.tags["edt.source"], classes=())
    monkeypatch.setattr(prepare, "champion_record", lambda *_: (version, line.records[version.run_id]))
    monkeypatch.setattr(prepare, "prepare_source", lambda *_: source)
    retraining = prepare.prepare(None, Request("m", line.store), None)  # type: ignore[arg-type]
    if ended:
        assert retraining.nothing_to_do == "the images are those of m version 2"
    else:
        assert retraining.nothing_to_do == ""
        assert retraining.config.train_of("m").init_from == "models:/m/1"  # the run of version 2, not one from it
        assert retraining.config.train_of("m").max_steps == 250
        assert "ended before its decision or its report" in retraining.notes[0]


def test_a_version_is_complete_once_a_run_recorded_its_report(tmp_path: Path) -> None:
    """A killed run records no steps; the next one may reuse all of them."""
    registry = Registry(tmp_path)
    registry.add("first", 5.0)
    catalog, version = registry.catalog, registry.version("1")

    def run(**tags: str) -> None:
        step = {f"edt.step.train.{NAME}": version.tags["edt.checkpoint"]}
        catalog.start_run("again", {"edt.workflow": "small", **step, **tags})

    assert DECISION_TAG in version.tags
    run()
    run(**{"edt.executed": f"train {NAME}, evaluate {NAME}", "edt.reused": f"report {NAME}-2"})
    catalog.start_run("other", {"edt.workflow": "small", "edt.executed": f"report {NAME}"})
    assert not has_ended(catalog, version)
    run(**{"edt.executed": "", "edt.reused": f"evaluate {NAME}, report {NAME}, train {NAME}"})
    assert has_ended(catalog, version)
    del version.tags[DECISION_TAG]
    assert not has_ended(catalog, version)


def test_limits_notifications_and_the_gate_make_no_other_training() -> None:
    same = ("retrain.max_drift=null", "notify.variable=HOOK", "promote.margin=0.05")
    assert not Request("m", "store", assignments=same).differs
    assert Request("m", "store", assignments=("train.lr=1",)).differs


@pytest.mark.parametrize("asked", [{"assignments": ("train.lr=1",)}, {"steps": 7}, {"from_scratch": True}])
def test_a_schedule_trains_once_on_the_same_images_whatever_it_sets(
    line: Line, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    """Else each night would train the champion of the night before further, on images that did not change."""
    line.add("train.max_steps=1000")
    version = line.versions["1"]
    source = SimpleNamespace(fingerprint=version.tags["edt.source"], classes=())
    monkeypatch.setattr(prepare, "champion_record", lambda *_: (version, line.records[version.run_id]))
    monkeypatch.setattr(prepare, "prepare_source", lambda *_: source)
    request = Request("m", line.store, when_data_changed=True, **asked)
    monkeypatch.setattr(prepare, "has_ended", lambda *_: True)
    assert prepare.prepare(None, request, None).nothing_to_do == "the images are those of m version 1"  # type: ignore[arg-type]
    assert Request("m", line.store, **asked).differs


def test_drift_without_a_reference_of_the_images_holds_back() -> None:
    """A published reference is the same whatever the images are."""
    guard = DriftGuard(Version(1), 5.0)
    published = SimpleNamespace(counts={"source": "published statistics"})
    with pytest.raises(HeldBackError, match=r"published statistics.*retrain\.max_drift=null"):
        guard._measured(None, None, published)  # type: ignore[arg-type]


def test_drift_from_a_damaged_reference_holds_back(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = DriftGuard(SimpleNamespace(name="m", version="1", tags={}), 5.0)
    monkeypatch.setattr(DriftGuard, "_artifacts", lambda self, store: (None, None))
    monkeypatch.setattr(DriftGuard, "_check_classes", lambda self, before, now: None)

    def damaged(before: object, now: object) -> None:
        raise ManifestError("reference.safetensors differs")

    monkeypatch.setattr(drift, "drift", damaged)
    with pytest.raises(HeldBackError, match=r"cannot be measured: reference\.safetensors differs.*max_drift=null"):
        guard._measured(None, None, SimpleNamespace(counts={"source": "images"}))  # type: ignore[arg-type]


def test_a_training_that_takes_too_long_is_refused_and_one_that_does_not_ends_in_time() -> None:
    version = Version(1, **{"edt.cost.device_hours": "8.0", "edt.cost.steps": "1000"})
    limits = ["models={m: {num_workers: 2}}", "train.max_steps=250"]
    config = load_config("quickstart", [*limits, "retrain.max_device_hours=1.5"])
    refused = over_limit(config, version, "m")
    assert re.search(r"250 steps takes about 2 device hours .* Use --steps 187, or raise the limit", refused)
    assert over_limit(config, Version(1), "m") == ""  # its pace is not recorded
    enough = load_config("quickstart", [*limits, "retrain.max_device_hours=3"])
    assert over_limit(enough, version, "m") == over_limit(load_config("quickstart", limits), version, "m") == ""
    assert guarded(enough, "m").train_of("m").max_hours == 1.5  # of each of the two workers
    assert guarded(load_config("quickstart", limits), "m").train_of("m").max_hours is None


def test_published_networks_stay(line: Line) -> None:
    inception = ["extractors=[inception]", "promote.metric=fid", "inception.weights=/w/inception.pth"]
    factor = ["autoencoder.pretrained=stabilityai/sd-vae-ft-ema", "autoencoder.downsample_factor=4"]
    line.add(*inception, *factor, tags={"edt.inception": "a" * 64})
    config = line.config()
    assert config.autoencoder.pretrained == "stabilityai/sd-vae-ft-ema"
    assert config.classifier.pretrained is None
    assert config.network("inception").sha256 == "a" * 64
    assert line.config(from_scratch=True).autoencoder.pretrained == "stabilityai/sd-vae-ft-ema"


def test_other_images_are_selected_as_before(line: Line) -> None:
    line.add("source={kind: image_folder, path: /old, classes: [cat, dog], class_folder: last}")
    source = line.config(images="/new").source
    assert (source.path, source.kind, source.classes, source.class_folder) == (
        "/new",
        "image_folder",
        ("cat", "dog"),
        "last",
    )
    line.add()
    assert (line.config(images="/new").source.path, line.config(images="/new").source.kind) == ("/new", "auto")


def test_an_image_that_could_not_be_read_is_no_change(tmp_path: Path) -> None:
    """It is in the folder, and not in the artifact: it is neither new nor gone."""
    root = tmp_path / "images"
    for number in range(4):
        folder = root / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    (root / "class0" / "broken.png").write_bytes(b"no image")
    store = Store.open(str(tmp_path / "store"))
    config = PreprocessConfig(image_size=8, max_bad_fraction=1)
    source = image_source(SourceConfig(path=str(root)))
    out = store.writer("images", preprocess.STAGE.fingerprint(config, {"source": source.fingerprint}))
    with local_ray():
        made = preprocess.STAGE.execute(config, {"source": source}, out, Silent())
    version = SimpleNamespace(tags={"edt.images": made.fingerprint})
    change = delta_of(version, store, source)
    assert change is not None
    assert (bool(change), change.unchanged) == (False, 4)
    shutil.copy(root / "class1" / "1.png", root / "class1" / "copy.png")
    (root / "class0" / "broken.png").write_bytes(b"another")
    change = delta_of(version, store, image_source(SourceConfig(path=str(root))))
    assert change is not None
    assert str(change) == "+2 -0 images: class0 +1, class1 +1"
    assert delta_of(SimpleNamespace(tags={}), store, source) is None
    assert delta_of(None, store, source) is None


def said(result: Result) -> str:
    return str(result.exception) if isinstance(result.exception, UserError) else result.output


def test_whatever_is_missing_is_one_message_with_the_way_on(tmp_path: Path) -> None:
    registry = Registry(tmp_path)

    def refused(name: str, *options: str) -> str:
        result = CliRunner().invoke(app, ["retrain", name, *registry.arguments, *options])
        assert isinstance(result.exception, UserError), result.output
        return said(result)

    assert "Train it first: `edt run CONFIG`" in refused("nobody")
    registry.add("first", 5.0)
    message = refused(NAME)  # its run has no configuration among its artifacts
    assert f"the configuration of {NAME} version 1 cannot be read" in message
    assert f"train.init_from={NAME}/1" in message
    client = registry.catalog.client
    run = str(registry.version("1").run_id)
    client.log_text(run, as_yaml(load_config("quickstart", ["models={other: {}}"])), "config.yaml")
    client.log_text(run, "{}", "environment.json")
    assert f"has no model '{NAME}', but other" in refused(NAME)
    client.log_text(run, as_yaml(load_config("quickstart", [f"models={{{NAME}: {{}}}}"])), "config.yaml")
    assert "cannot be kept" in (message := refused(NAME))
    assert "--from-scratch" in message
    client.delete_registered_model_alias(NAME, "champion")
    message = refused(NAME)
    assert f"{NAME} has no champion; its versions are 1." in message
    assert "--from-scratch" in message
    registry.catalog.set_tags(run, {f"edt.step.train.{NAME}": "f" * 64})
    registry.catalog.end_run(run, "FINISHED")
    version, record = champion_record(registry.catalog, NAME, from_scratch=True)  # the newest run has the configuration
    assert (version, record.run_id) == (None, run)
    client.delete_model_version(NAME, "1")
    assert "has no versions; they were deleted" in refused(NAME)


def test_weights_that_are_gone_are_said_with_the_way_on(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object) -> None:
        raise UserError("m version 1 is damaged")

    line.add()
    monkeypatch.setattr("pipelines.retrain.prepare.initial_source", damaged)
    with pytest.raises(UserError, match=r"m cannot be trained further: m version 1 is damaged\. .* --from-scratch"):
        _check_start(line.config(), SimpleNamespace(tracking_uri=""), "m")  # type: ignore[arg-type]


def test_other_classes_hold_a_run_back_where_drift_is_limited() -> None:
    guard = DriftGuard(Version(3), 10.0)
    old, new = (SimpleNamespace(read_json=lambda _, names=names: names) for names in (["cat", "owl"], ["cat", "fox"]))
    guard._check_classes(old, old)  # type: ignore[arg-type]
    with pytest.raises(HeldBackError, match=r"not those of m version 3 .new: fox; gone: owl.*retrain\.max_drift=null"):
        guard._check_classes(old, new)  # type: ignore[arg-type]
    assert drift_guard(load_config("quickstart"), Version(3)) is None
    assert drift_guard(load_config("quickstart", ["retrain.max_drift=10"]), None) is None


def test_a_schedule_retrains(tmp_path: Path) -> None:
    made = new_schedule(None, MODEL, ["train.lr=1e-4"], str(tmp_path), "0 3 * * 0", "UTC", retrain=True)
    assert made.name == f"retrain-{MODEL}"
    line = command(made)
    assert line[line.index("pipelines.cli") + 1 :] == [
        *[
            "retrain",
            "--when-data-changed",
            "--no-overlap",
            "--store",
            Folder.at(tmp_path).uri,
            "--set",
            "train.lr=1e-4",
            "--",
            MODEL,
        ]
    ]
    with pytest.raises(UserError, match="--when-data-changed"):
        new_schedule(None, MODEL, [], str(tmp_path), "0 3 * * 0", "UTC", when_data_changed=True, retrain=True)


@pytest.fixture
def edt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def call(*arguments: str) -> Any:
        result = CliRunner().invoke(app, [*arguments, "--json"])
        assert result.exit_code == 0, f"{result.output}\n{result.exception}"
        return json.loads(result.stdout)

    return call


@pytest.mark.usefixtures("training_here")
def test_images_arrive_and_the_model_is_trained_further(tmp_path: Path, edt: Callable[..., Any]) -> None:
    whole, folder, store = write_digits(tmp_path / "digits"), tmp_path / "images", tmp_path / "store"

    def arrive(first: int, last: int) -> None:
        for label in "0123456789":
            (folder / label).mkdir(parents=True, exist_ok=True)
            for path in sorted((whole / label).iterdir())[first:last]:
                path.rename(folder / label / path.name)

    arrive(0, 20)
    base = pipeline(store, "source.kind=image_folder", f"source.path={folder}", "source.limit=null")
    assert base.decisions[MODEL].became_champion
    asked = ["retrain", MODEL, "--store", str(store)]
    assert edt(*asked) == {"status": "nothing to do", "reason": f"the images are those of {MODEL} version 1"}

    arrive(0, 3)
    plan = edt(*asked, "--plan")
    digits = dict.fromkeys("0123456789", 3)
    assert (plan["delta"]["before"], plan["delta"]["now"], plan["delta"]["unchanged"]) == (200, 230, 200)
    assert (plan["delta"]["added"], plan["delta"]["removed"]) == (digits, {})
    assert (plan["champion"], plan["init_from"], plan["max_steps"]) == ("1", f"models:/{MODEL}/1", 2)
    actions = {step["step"]: step["action"] for step in plan["steps"]}
    assert {name for name, action in actions.items() if action == "reuse"} == {
        *("autoencoder", "classifier", f"sample champion {MODEL}")
    }

    assert plan["drift"] == {}  # there is no new reference yet
    short = [*asked, "--set", "retrain.max_device_hours=1e-9"]
    assert "retrain.max_device_hours is 1e-09. Use --steps 1" in CliRunner().invoke(app, [*short, "--plan"]).output
    refused = CliRunner().invoke(app, short)
    assert isinstance(refused.exception, UserError)
    assert "retrain.max_device_hours is 1e-09" in str(refused.exception)

    held = CliRunner().invoke(app, [*asked, "--set", "retrain.max_drift=1e-9"])
    assert held.exit_code == 2
    assert f"the images drifted from those of {MODEL} version 1" in held.output
    assert "--set retrain.max_drift=null" in held.output
    drift_known = edt(*asked, "--plan")["drift"]["classifier"]
    assert drift_known > 0
    catalog = Catalog.existing(Folder.at(store))
    assert len(catalog.client.search_model_versions(f"name = '{MODEL}'")) == 1

    outcome = edt(*asked)["models"][MODEL]
    assert outcome["version"] == "2"
    version = catalog.client.get_model_version(MODEL, "2")
    decision = json.loads(version.tags["edt.decision"])
    assert decision["champion_before"] == "1"
    assert decision["remeasured"]["protocol"] == version.tags["edt.protocol"]
    assert f"{drift_known:.4g} in the features of classifier" in Path(outcome["report"]).read_text()
    assert version.tags["edt.autoencoder"] == catalog.client.get_model_version(MODEL, "1").tags["edt.autoencoder"]

    again = edt(*asked)
    assert again["status"] == "nothing to do"
    assert f"{MODEL} version 2" in again["reason"]
    assert len(catalog.client.search_model_versions(f"name = '{MODEL}'")) == 2

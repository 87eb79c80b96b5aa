"""The champion measured again: the gate compares values of one protocol after images or sampling changed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edt_core.errors import UserError
from edt_core.evaluation.protocol import protocol_differences
from edt_core.store.artifact import sha256_json
from edt_core.store.store import Store
from pipelines.champion import ChampionMeasurement
from pipelines.commands.options import catalog_if_any
from pipelines.config.schema import PromoteConfig, load_config
from pipelines.outcome import Outcome
from pipelines.plan import PlannedStep, plan
from pipelines.registry.aliases import add_version, crown, promote_version, set_tags
from pipelines.registry.gate import Decision, Remeasured, decide
from pipelines.registry.registration import identity_of, version_tags
from pipelines.tracking.catalog import Catalog
from pipelines.tracking.runs import read_record
from tests.support.registry import NAME, PROTOCOL, Registry
from tests.support.small import MODEL, SMALL, copy_store, pipeline

NEW = {**PROTOCOL, "reference": "new"}
KEPT = (f"autoencoder.pretrained=models:/{MODEL}@champion", f"classifier.pretrained=models:/{MODEL}@champion")


class Version:
    """What the gate reads of a version: its tags."""

    def __init__(self, number: int, value: float, protocol: dict[str, Any], std: float | None = None) -> None:
        self.name, self.version = "m", str(number)
        self.tags = {"edt.metric.fd_classifier": repr(value), "edt.protocol": sha256_json(protocol)}
        self.tags["edt.protocol_fields"] = json.dumps(protocol)
        if std is not None:
            self.tags["edt.metric.fd_classifier_std"] = repr(std)


def again(
    value: float, number: str = "3", std: float | None = None, repeats: int = 1, protocol: Any = NEW
) -> Remeasured:
    metrics = {"fd_classifier": value} | ({} if std is None else {"fd_classifier_std": std})
    return Remeasured(number, metrics, repeats, sha256_json(protocol), "e" * 64, "/store/e", "on the new reference")


CHAMPION = Version(3, 1.0, PROTOCOL)  # a value that nothing beats, of the old reference


@pytest.mark.parametrize(("value", "expected"), [(4.9, True), (4.96, False), (6.0, False)])
def test_the_values_measured_again_decide_and_their_margin_too(value: float, expected: bool) -> None:
    decision = decide(Version(4, value, NEW), PromoteConfig(), CHAMPION, again=again(5.0))
    assert (decision.became_champion, decision.champion_value) == (expected, 5.0)
    assert decision.required == pytest.approx(0.05)
    assert "version 3 has 5 (measured again on the new reference), " in str(decision)
    assert Decision.from_json(decision.to_json()) == decision


def test_the_spread_measured_again_is_the_champions() -> None:
    new = {**NEW, "repeats": 3}
    gates = [again(5.0, std=std, repeats=3, protocol=new) for std in (0.1, 0.6)]
    decisions = [decide(Version(4, 4.0, new, 0.1), PromoteConfig(), CHAMPION, again=gate) for gate in gates]
    assert [decision.became_champion for decision in decisions] == [True, False]
    assert [decision.required for decision in decisions] == [0.2, 1.2]


def test_values_of_another_champion_or_protocol_do_not_count() -> None:
    for gate in (again(5.0, "2"), again(5.0, protocol={**NEW, "cfg_scale": 9})):
        decision = decide(Version(4, 0.1, NEW), PromoteConfig(), CHAMPION, again=gate)
        assert (decision.became_champion, decision.champion_value) == (False, None)
        assert "measured by another protocol" in str(decision)
    same = decide(Version(4, 0.5, PROTOCOL), PromoteConfig(), CHAMPION, again=again(0.1))
    assert (same.champion_value, same.remeasured) == (1.0, None)  # the recorded value is of one protocol


def test_a_champion_that_cannot_be_measured_stays_and_the_decision_says_why() -> None:
    failed = Remeasured("3", problem="its images have 64 px, and those of the new version 32 px")
    decision = decide(Version(4, 0.1, NEW), PromoteConfig(), CHAMPION, again=failed)
    assert not decision.became_champion
    assert "cannot be measured again: its images have 64 px" in str(decision)
    assert "edt models promote m/4 --force" in str(decision)
    assert Decision.from_json(decision.to_json()) == decision
    assert decide(Version(4, 0.1, NEW), PromoteConfig(), CHAMPION, force=True, again=failed).became_champion


def test_a_promotion_by_hand_goes_by_the_recorded_measurement(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.add("first", 1.0)
    refused = registry.add("second", 4.0, protocol=NEW)
    assert "another protocol" in str(refused)
    version = registry.version(refused.version)
    measured = Decision.from_json(refused.to_json())
    text = json.dumps(json.loads(measured.to_json()) | {"remeasured": json.loads(json.dumps(vars(again(5.0, "1"))))})
    set_tags(registry.catalog, version, {"edt.decision": text})
    decision = promote_version(registry.catalog, registry.version(refused.version))
    assert decision.became_champion
    assert decision.champion_value == 5.0


def test_killed_between_the_alias_and_the_decision_the_champion_before_is_measured_again(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.add("first", 1.0)
    run, config = registry.run()
    entry = registry.entry("second", {"fd_classifier": 4.0}, NEW, run)
    measurement = ChampionMeasurement(config, NAME, {}, {})
    assert str(measurement._compared(registry.catalog, vars(entry)).version) == "1"
    identity = identity_of(entry, config.promote)
    version = add_version(
        registry.catalog, NAME, "file:///nowhere", run, version_tags({}, config.promote, entry), identity
    )
    crown(registry.catalog, version, "1", "a run that was killed")
    assert str(measurement._compared(registry.catalog, vars(entry)).version) == "1"
    set_tags(registry.catalog, version, {"edt.decision": "{}"})
    assert measurement._compared(registry.catalog, vars(entry)) is None


def planned(store: Path, *assignments: str) -> dict[str, PlannedStep]:
    config = load_config("quickstart", [*SMALL, *assignments], str(store))
    return {step.step: step for step in plan(config, catalog_if_any(str(store)))}


@pytest.mark.usefixtures("training_here")
def test_more_images_are_decided_on_by_one_protocol(first: Outcome, store: Path, tmp_path: Path) -> None:
    copy_store(store, tmp_path / "store")
    copied, more = tmp_path / "store", [*KEPT, "source.limit=420"]
    steps = planned(copied, *more)
    assert steps[f"sample champion {MODEL}"].action == "reuse"  # its features do not depend on the images
    assert steps[f"evaluate champion {MODEL}"].action == "run"

    outcome = pipeline(copied, *more)
    assert outcome.failures == {}
    decision = outcome.decisions[MODEL]
    assert decision.remeasured is not None
    assert decision.remeasured.how == "on the new reference"
    opened = Store.open(str(copied))
    record = read_record(Catalog(outcome.tracking_uri, ""), outcome.run_id)
    ours, theirs = (opened.find("evaluation", record.steps[f"evaluate{infix}.{MODEL}"]) for infix in ("", ".champion"))
    assert ours is not None
    assert theirs is not None
    assert protocol_differences(ours.counts["protocol"], theirs.counts["protocol"]) == []
    values = [evaluation.counts["metrics"]["fd_classifier"] for evaluation in (ours, theirs)]
    assert [decision.value, decision.champion_value] == values
    assert decision.became_champion == (values[0] < values[1])
    assert decision.remeasured.evaluation == theirs.fingerprint
    assert planned(copied, *more).keys() == planned(store).keys()  # decided: nothing is measured again

    # Another way of sampling, and a champion whose artifacts are gone: it is sampled from its registered folder.
    number = decision.champion_after
    version = Catalog(outcome.tracking_uri, "").client.get_model_version(MODEL, str(number))
    shutil.rmtree(copied / "checkpoint" / version.tags["edt.checkpoint"])
    other = [*KEPT, "source.limit=440", "sample.num_sampling_steps=2"]
    assert planned(copied, *other)[f"sample champion {MODEL}"].action == "run"
    latest = pipeline(copied, *other).decisions[MODEL]
    assert (latest.champion_before, latest.remeasured and latest.remeasured.how) == (number, "by the new protocol")
    assert latest.remeasured is not None
    assert latest.remeasured.problem == ""
    assert latest.champion_value is not None


@pytest.mark.parametrize(("error", "is_problem"), [(UserError("too large"), True), (RuntimeError("lost"), False)])
def test_only_what_a_rerun_would_meet_again_is_a_problem(error: Exception, is_problem: bool, tmp_path: Path) -> None:
    """After a lost worker nothing is decided: a decision against the new version would stand for ever."""
    config = load_config("quickstart", [], str(tmp_path))

    def failed() -> None:
        raise error

    measurement = ChampionMeasurement(config, "m", {}, {})
    measurement._version = SimpleNamespace(version="1")
    measurement._evaluation = SimpleNamespace(result=failed)  # type: ignore[assignment]
    if is_problem:
        again = measurement.result()
        assert again is not None
        assert again.problem == "too large"
    else:
        with pytest.raises(RuntimeError, match="lost"):
            measurement.result()

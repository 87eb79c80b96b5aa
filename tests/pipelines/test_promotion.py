"""The gate: the margin and where it comes from, the checks, who moved the alias, and the way back."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edt_core.errors import UserError
from edt_core.store.artifact import sha256_json
from pipelines.cli import app
from pipelines.config.schema import PromoteConfig, load_config
from pipelines.registry.aliases import crown, promote_version, rollback, settle
from pipelines.registry.gate import Check, Decision, decide
from pipelines.registry.registration import identity_of, promote
from tests.support.registry import NAME, PROTOCOL, Registry


class Version:
    """What the gate reads of a version: its tags. `untrained`: value of the untrained model, and its spread."""

    def __init__(
        self,
        number: int,
        value: float,
        std: float | None = None,
        untrained: tuple[float, float | None] | None = None,
        **protocol: Any,
    ) -> None:
        self.name, self.version = "m", str(number)
        fields = {**PROTOCOL, **protocol}
        self.tags = {"edt.metric.fd_classifier": repr(value), "edt.protocol": sha256_json(fields)}
        self.tags["edt.protocol_fields"] = json.dumps(fields)
        if std is not None:
            self.tags["edt.metric.fd_classifier_std"] = repr(std)
        if untrained is not None:
            names = ("fd_classifier", "fd_classifier_std")
            values = {f"edt.untrained.{name}": value for name, value in zip(names, untrained, strict=True)}
            self.tags |= {name: repr(value) for name, value in values.items() if value is not None}


@pytest.mark.parametrize(
    ("value", "lower_is_better", "champion", "expected"),
    [
        (4.0, True, Version(3, 5.0), True),
        (6.0, True, Version(3, 5.0), False),
        (5.0, True, Version(3, 5.0), False),
        (4.95, True, Version(3, 5.0), True),  # just 1 % better
        (4.951, True, Version(3, 5.0), False),
        (6.0, False, Version(3, 5.0), True),
        (5.04, False, Version(3, 5.0), False),
        (9.0, True, None, True),
        (1.0, True, Version(3, 5.0, cfg_scale=2.0), False),  # better, but measured by another protocol
        (0.0, True, Version(3, 0.0), False),
        (-0.1, True, Version(3, 0.0), True),
        (-5.06, True, Version(3, -5.0), True),
        (float("nan"), True, Version(3, 5.0), False),
    ],
)
def test_champion_moves_only_to_what_is_better_by_the_same_protocol(
    value: float, lower_is_better: bool, champion: Version | None, expected: bool
) -> None:
    config = PromoteConfig(metric="fd_classifier", lower_is_better=lower_is_better)
    decision = decide(Version(4, value), config, champion)
    assert decision.became_champion == expected
    assert decision.champion_before == (champion.version if champion else None)
    assert decision.champion_after == ("4" if expected else decision.champion_before)


def test_the_margin_against_the_formula_said_another_way() -> None:
    rng = random.Random(0)
    outcomes = set()
    for _ in range(2000):
        old, new = rng.choice([1, -1]) * rng.uniform(1, 10), rng.choice([1, -1]) * rng.uniform(1, 10)
        if rng.random() < 0.5:
            new = old + rng.uniform(-0.5, 0.5)
        margin = rng.choice([None, 0.0, 0.02, 0.3])
        repeats = rng.choice([1, 5])
        spreads = [rng.uniform(0, 0.3) for _ in range(2)]
        lower = rng.random() < 0.5
        fid, before = (Version(k, v, s, repeats=repeats) for k, v, s in zip((2, 1), (new, old), spreads, strict=True))
        wins = decide(fid, PromoteConfig(lower_is_better=lower, margin=margin), before).became_champion
        gain = old - new if lower else new - old
        if margin is not None:
            expected = gain > 0 and gain >= margin * abs(old)
        else:
            expected = gain > 2 * max(spreads) if repeats > 1 else gain >= 0.01 * abs(old)
        assert wins == expected
        outcomes.add((wins, margin, repeats))
    assert len(outcomes) == 16  # both ways, under every rule


@pytest.mark.parametrize(("value", "expected"), [(4.5, False), (4.499, True)])
def test_two_standard_deviations_are_not_more_than_two(value: float, expected: bool) -> None:
    versions = Version(4, value, 0.125, repeats=3), Version(3, 5.0, 0.25, repeats=3)
    assert decide(versions[0], PromoteConfig(), versions[1]).became_champion == expected


def test_the_spread_over_parts_of_one_set_is_none_over_repeats() -> None:
    decision = decide(Version(4, 4.9, std=9.0), PromoteConfig(), Version(3, 5.0, std=9.0))
    assert decision.became_champion
    assert decision.required == pytest.approx(0.05)


def test_any_failed_check_keeps_a_version_from_the_alias() -> None:
    passed, failed = Check("the metrics", True), Check("the required limits", False, "recall 0.2 is below 0.4")
    for before in (None, Version(3, 5.0)):
        assert decide(Version(4, 1.0), PromoteConfig(), before, [passed]).became_champion
        refused = decide(Version(4, 1.0), PromoteConfig(), before, [passed, failed])
        assert not refused.became_champion
        assert "candidate only: fd_classifier 1; failed the check of the required limits, recall 0.2" in str(refused)
        forced = decide(Version(4, 1.0), PromoteConfig(), before, [passed, failed], force=True)
        assert (forced.became_champion, forced.forced) == (True, True)


def test_a_decision_is_one_sentence_with_its_numbers() -> None:
    sentences = {
        str(decide(Version(4, value), PromoteConfig(), before))
        for value, before in [(4.0, None), (4.0, Version(3, 5.0)), (4.99, Version(3, 5.0)), (6.0, Version(3, 5.0))]
    }
    needed = "required 0.05 (1% of the champion's value)"
    assert sentences == {
        "first champion: fd_classifier 4; there is no champion and no value of an untrained model to compare with",
        f"new champion: fd_classifier 4; version 3 has 5, better by 1, {needed}",
        f"candidate only: fd_classifier 4.99; version 3 has 5, better by 0.01, {needed}",
        f"candidate only: fd_classifier 6; version 3 has 5, worse by 1, {needed}",
    }


@pytest.mark.parametrize(
    ("value", "lower_is_better", "untrained", "expected"),
    [
        (4.0, True, 5.0, True),
        (4.95, True, 5.0, True),  # just 1 % better
        (4.951, True, 5.0, False),
        (5.0, True, 5.0, False),
        (6.0, True, 5.0, False),
        (6.0, False, 5.0, True),
        (4.0, False, 5.0, False),
        (9.0, True, float("nan"), True),  # nothing to compare with
        (9.0, True, float("inf"), True),
    ],
)
def test_a_first_champion_is_better_than_the_untrained_model(
    value: float, lower_is_better: bool, untrained: float, expected: bool
) -> None:
    config = PromoteConfig(lower_is_better=lower_is_better)
    decision = decide(Version(1, value, untrained=(untrained, None)), config, None)
    assert decision.became_champion == expected
    assert decision.champion_after == ("1" if expected else None)
    assert (decision.champion_before, decision.champion_value) == (None, None)
    assert decision.unopposed == (not math.isfinite(untrained))
    assert Decision.from_json(decision.to_json()) == decision


def test_the_untrained_model_is_compared_by_the_rule_for_champions() -> None:
    """Whatever decides against a champion of these values decides against an untrained model of them."""
    rng = random.Random(1)
    outcomes = set()
    for _ in range(500):
        value, other = rng.uniform(1, 10), rng.uniform(1, 10)
        if rng.random() < 0.5:
            value = other + rng.uniform(-0.5, 0.5)
        spreads = [rng.uniform(0, 0.3) for _ in range(2)]
        repeats, margin, lower = rng.choice([1, 5]), rng.choice([None, 0.0, 0.02, 0.3]), rng.random() < 0.5
        config = PromoteConfig(lower_is_better=lower, margin=margin)
        new = Version(2, value, spreads[0], untrained=(other, spreads[1]), repeats=repeats)
        against = decide(new, config, Version(1, other, spreads[1], repeats=repeats))
        alone = decide(new, config, None)
        assert (alone.became_champion, alone.required) == (against.became_champion, against.required)
        assert alone.required_from == against.required_from.replace("the champion's", "the untrained model's")
        outcomes.add((alone.became_champion, margin, repeats))
    assert len(outcomes) == 16


def test_a_champion_counts_and_the_untrained_model_beside_it_does_not() -> None:
    new = Version(4, 4.0, untrained=(1.0, None))
    decision = decide(new, PromoteConfig(), Version(3, 5.0))
    assert (decision.became_champion, decision.untrained_value) == (True, None)


def test_a_decision_without_a_champion_says_what_it_was_compared_with() -> None:
    needed = "required 0.05 (1% of the untrained model's value)"
    by_hand = "train longer (train.max_steps), or promote it by hand: `edt models promote m/1 --force`"
    limits = Check("the required limits", False, "recall 0.2 is below 0.4")
    better, close, same = (Version(1, value, untrained=(5.0, None)) for value in (4.0, 4.99, 5.0))
    compared = "fd_classifier 4; the untrained model has 5, better by 1"
    assert str(decide(better, PromoteConfig(), None)) == f"first champion: {compared}, {needed}"
    assert str(decide(close, PromoteConfig(), None)) == (
        f"candidate only: fd_classifier 4.99; the untrained model has 5, better by 0.01, {needed}; {by_hand}"
    )
    assert str(decide(same, PromoteConfig(), None)) == (
        f"candidate only: fd_classifier 5; the untrained model has 5, the same, {needed}; {by_hand}"
    )
    assert str(decide(close, PromoteConfig(), None, force=True)).startswith("forced, first champion: ")
    refused = str(decide(better, PromoteConfig(), None, [limits]))
    assert refused.startswith("candidate only: fd_classifier 4; failed the check of the required limits")
    assert "train longer" not in refused  # more steps do not mend a limit


def test_decisions_are_kept_whole_and_those_of_older_versions_are_read() -> None:
    checks = [Check("the metrics", True), Check("the registered files", False, "a is missing")]
    for before in (None, Version(3, 5.0), Version(3, 5.0, cfg_scale=9)):
        decision = decide(Version(4, 1.5), PromoteConfig(), before, checks)
        assert Decision.from_json(decision.to_json()) == decision
    old = {
        "name": "m",
        "version": "2",
        "metric": "fid",
        "value": 4.0,
        "champion_before": "1",
        "champion_value": 5.0,
        "became_champion": True,
    }
    read = Decision.from_json(json.dumps(old))
    assert (read.champion_after, read.checks, read.required) == ("2", (), None)
    assert str(read) == "new champion: fid 4; version 1 has 5, better by 1"
    assert Decision.from_json(json.dumps({**old, "of a later version": 1})) == read
    first = Decision.from_json(json.dumps({**old, "champion_before": None, "champion_value": None}))
    assert str(first) == "first champion: fid 4"  # reports of that version have this text, and are reused


def test_limits_are_checked_when_they_are_configured() -> None:
    given = "promote.require={accuracy_classifier: [0.9, null]}"
    assert load_config("quickstart", [given]).promote.require == {"accuracy_classifier": (0.9, None)}
    with pytest.raises(UserError, match=r"promote\.require 'fidd' is not measured"):
        load_config("quickstart", ["promote.require={fidd: [0, 1]}"])
    with pytest.raises(UserError, match="the least is above the most"):
        load_config("quickstart", ["promote.require={accuracy_classifier: [2, 1]}"])


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Registry(tmp_path / "store")


def edt(*arguments: str) -> tuple[int, str]:
    """Exit code and output; a user's error is raised, as `main` prints it and leaves with 2."""
    done = CliRunner().invoke(app, arguments)
    if isinstance(done.exception, UserError):
        raise done.exception
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_champions_follow_each_other_and_roll_back_in_turn(registry: Registry) -> None:
    for key, value in (("a", 5.0), ("b", 4.0), ("c", 4.5), ("d", 3.0)):
        registry.add(key, value)
    assert registry.champion() == "4"
    tags = registry.version("4").tags
    assert tags["edt.champion_before"] == "2"
    assert " by run " in tags["edt.promoted"]
    assert edt("models", "rollback", NAME, *registry.arguments)[0] == 0
    assert registry.champion() == "2"
    assert "to version 2" in registry.version("4").tags["edt.rolled_back"]
    rollback(registry.catalog, NAME)
    assert registry.champion() == "1"
    with pytest.raises(UserError, match="first champion; there is no previous one"):
        rollback(registry.catalog, NAME)
    with pytest.raises(UserError, match="no-such has no champion"):
        rollback(registry.catalog, "no-such")


def measured(value: float, **protocol: Any) -> dict[str, Any]:
    """The untrained model's evaluation."""
    return {"metrics": {"fd_classifier": value}, "protocol": {**PROTOCOL, **protocol}}


def test_a_version_no_better_than_random_weights_is_registered_without_the_alias(registry: Registry) -> None:
    refused = registry.add("a", 4.99, untrained=measured(5.0))
    assert not refused.became_champion
    assert registry.version("1").aliases == ["candidate"]
    code, output = edt("models", "show", f"{NAME}/1", *registry.arguments)
    assert code == 0
    assert str(refused) in " ".join(output.split())
    code, output = edt("models", "promote", f"{NAME}/1", *registry.arguments)  # the gate again, by its own record
    assert code == 1
    assert "the untrained model has 5, better by 0.01, required 0.05" in output
    with pytest.raises(UserError, match="has no champion to roll back"):
        rollback(registry.catalog, NAME)

    assert registry.add("b", 4.9, untrained=measured(5.0)).became_champion
    assert registry.champion() == "2"
    assert registry.version("2").tags["edt.champion_before"] == ""


def test_random_weights_are_no_measure_under_another_protocol_or_by_another_metric(registry: Registry) -> None:
    for number, other in enumerate((measured(1.0, cfg_scale=9), {**measured(1.0), "metrics": {"fid": 1.0}}, None)):
        decision = registry.add("a", 4.0, name=f"m{number}", untrained=other)
        assert (decision.became_champion, decision.unopposed) == (True, True)
        assert str(decision).endswith("there is no champion and no value of an untrained model to compare with")


def test_a_version_refused_for_random_weights_is_promoted_by_hand(registry: Registry) -> None:
    registry.add("a", 6.0, untrained=measured(5.0))
    code, output = edt("models", "promote", f"{NAME}/1", "--force", *registry.arguments)
    assert code == 0
    assert "forced, first champion: fd_classifier 6; the untrained model has 5, worse by 1" in output
    assert registry.champion() == "1"


def test_rollbacks_end_whatever_was_promoted_twice(registry: Registry) -> None:
    for key, value in (("a", 5.0), ("b", 4.0)):
        registry.add(key, value)
    promote_version(registry.catalog, registry.version("1"), force=True)
    assert str(rollback(registry.catalog, NAME)[1].version) == "2"
    with pytest.raises(UserError, match="no previous one"):
        list(iter(lambda: rollback(registry.catalog, NAME), None))


def test_a_rerun_does_not_promote_again_what_was_rolled_back(registry: Registry) -> None:
    registry.add("a", 5.0)
    decision = registry.add("b", 4.0)
    run, config = registry.run()
    entry = registry.entry("b", {"fd_classifier": 4.0}, PROTOCOL, run)
    rollback(registry.catalog, NAME)
    assert promote(registry.catalog, run, NAME, config.promote, entry) == decision
    assert decision.became_champion
    assert registry.champion() == "1"


def test_killed_between_the_alias_and_the_decision_it_is_settled_by_the_next_run(registry: Registry) -> None:
    registry.add("a", 5.0)
    whole = registry.add("b", 4.0)
    catalog, version = registry.catalog, registry.version("2")
    catalog.client.delete_model_version_tag(NAME, "2", "edt.decision")
    crown(catalog, version, "1", "run that was killed")
    run, config = registry.run()
    entry = registry.entry("b", {"fd_classifier": 4.0}, PROTOCOL, run)
    assert promote(catalog, run, NAME, config.promote, entry) == whole
    assert registry.champion() == "2"


def test_refused_is_exit_code_1_and_forced_is_recorded(registry: Registry) -> None:
    registry.add("a", 5.0)
    registry.add("b", 4.99)
    code, output = edt("models", "promote", f"{NAME}/2", *registry.arguments)
    assert code == 1
    assert "candidate only: fd_classifier 4.99; version 1 has 5, better by 0.01, required 0.05" in output
    assert registry.champion() == "1"
    code, output = edt("models", "promote", NAME, "--force", *registry.arguments)  # the candidate
    assert code == 0
    assert "forced, new champion" in output
    assert registry.champion() == "2"
    tags = registry.version("2").tags
    assert tags["edt.promoted"].endswith("by edt models promote --force")
    assert Decision.from_json(tags["edt.decision"]).forced
    with pytest.raises(UserError, match="is the champion already"):
        edt("models", "promote", f"{NAME}@champion", *registry.arguments)


def test_the_gate_that_a_version_was_registered_with_is_kept(registry: Registry) -> None:
    registry.add("a", 5.0)
    registry.add("b", 4.0, PromoteConfig(margin=0.5))
    assert registry.champion() == "1"
    refused = promote_version(registry.catalog, registry.version("2"))
    assert refused.required_from == "promote.margin 0.5 of the champion's value"
    assert not refused.became_champion


def test_limits_keep_a_first_champion_out(registry: Registry) -> None:
    gate = PromoteConfig(require={"accuracy_classifier": (0.9, None), "recall_classifier": (0.1, None)})
    decision = registry.add("a", 5.0, gate, accuracy_classifier=0.8)
    assert not decision.became_champion
    assert "accuracy_classifier 0.8 is below 0.9; recall_classifier was not measured" in str(decision)
    assert registry.add("b", 9.0, gate, accuracy_classifier=0.95, recall_classifier=0.5).became_champion


@pytest.mark.parametrize(
    ("damaged", "check", "told"),
    [
        (
            "checkpoint/*/attempt/ema",
            "the checkpoint artifact",
            "ema has 1 bytes as in its manifest, but another sha256",
        ),
        ("evaluation/*/attempt/metrics.json", "the evaluation artifact", "another sha256"),
        ("models/a/artifacts/pipeline/model_index.json", "the registered files", "model_index.json has another sha256"),
        ("models/a/artifacts/digests.json", "the registered files", "digests.json has another sha256 than its tag"),
    ],
)
def test_one_flipped_byte_is_a_failed_check(registry: Registry, damaged: str, check: str, told: str) -> None:
    registry.add("a", 5.0, PromoteConfig(require={"fd_classifier": (None, 1.0)}))  # whole, but no champion
    registry.catalog.client.set_model_version_tag(NAME, "1", "edt.gate", PromoteConfig().model_dump_json())
    (path,) = registry.root.glob(damaged)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))
    decision = promote_version(registry.catalog, registry.version("1"))
    assert [failed.name for failed in decision.failed] == [check]
    assert told in str(decision)
    assert not decision.became_champion
    data[0] ^= 1
    path.write_bytes(bytes(data))
    assert promote_version(registry.catalog, registry.version("1")).became_champion


def test_two_drivers_that_register_one_model_at_once_leave_one_version(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes between the first's look and its creation, as on two machines without a lock."""
    from pipelines.registry import aliases as module

    run, config = registry.run()
    entry = registry.entry("a", {"fd_classifier": 5.0}, PROTOCOL, run)
    assert module.find_version(registry.catalog, NAME, identity_of(entry, config.promote)) is None
    first = registry.add("a", 5.0)
    second = registry.add("a", 5.0)
    assert replace(second, checks=()) == replace(first, checks=())
    assert [str(v.version) for v in module.search(registry.catalog, f"name = '{NAME}'")] == ["1"]
    assert registry.champion() == "1"


def test_settling_twice_is_settling_once(registry: Registry) -> None:
    registry.add("a", 5.0)
    first = registry.add("b", 4.0)
    again = settle(registry.catalog, registry.version("2"), PromoteConfig(), "run again", list)
    assert again == first
    assert registry.version("2").tags["edt.champion_before"] == "1"

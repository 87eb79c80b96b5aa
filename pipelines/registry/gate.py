"""The gate: whether a version becomes champion, by the records of both versions and by checks.

With v the value of the new version, c that of the champion and r the required improvement, a version becomes champion
if both have the same protocol, no check failed, and v is better than c by at least r. If the champion was registered
with values of another protocol, c is the value that a run measured again (`Remeasured`). While there is no champion, c
is the value of the untrained model. If that was not measured, the checks alone decide.

    r = margin * |c|                    if `promote.margin` is set
    r = 2 * max(std of v, std of c)     else, if each is the mean of several repeats; v must be better by more than r
    r = 0.01 * |c|                      else
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from edt_core.errors import UserError
from edt_core.evaluation.worth import DEVIATIONS, noise_of_repeats
from edt_core.store.artifact import Artifact
from pipelines.config.schema import PromoteConfig
from pipelines.registry.distilled.teacher_record import TeacherRecord

METRIC_TAG = "edt.metric."
UNTRAINED_TAG = "edt.untrained."  # of the untrained model, measured by the protocol of the version
PROTOCOL_TAG, PROTOCOL_FIELDS_TAG = "edt.protocol", "edt.protocol_fields"
DEFAULT_MARGIN = 0.01
_ROUNDING = 1e-9  # of the required improvement: 4.95 is 1 % better than 5


@dataclass(frozen=True)
class Check:
    """A check that every new champion must pass, with its result."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Remeasured:
    """A champion measured again by the protocol of the version that is compared with it.

    `metrics` are the deciding one and its spread, `protocol` is the sha256 of that protocol, and `evaluation` and `uri`
    are the artifact that has the values. `problem` says why the champion could not be measured; then nothing else is.
    """

    version: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    repeats: int = 1
    protocol: str = ""
    evaluation: str = ""
    uri: str = ""
    how: str = ""  # "on the new reference"
    problem: str = ""

    @property
    def tags(self) -> dict[str, str]:
        """The values as the tags of a version have them."""
        metrics = {f"{METRIC_TAG}{name}": repr(value) for name, value in self.metrics.items()}
        return {PROTOCOL_TAG: self.protocol, PROTOCOL_FIELDS_TAG: json.dumps({"repeats": self.repeats}), **metrics}


@dataclass(frozen=True)
class Untrained:
    """The untrained model of a version, with its values as the tags of a version have them."""

    tags: Mapping[str, str]

    @classmethod
    def of(cls, version: Any, metric: str) -> "Untrained | None":
        """That of a version; None if the metric was not measured, or is not finite."""
        text = version.tags.get(f"{UNTRAINED_TAG}{metric}")
        if text is None or not math.isfinite(float(text)):
            return None
        values = {
            f"{METRIC_TAG}{key.removeprefix(UNTRAINED_TAG)}": value
            for key, value in version.tags.items()
            if key.startswith(UNTRAINED_TAG)
        }
        protocol = {key: version.tags[key] for key in (PROTOCOL_TAG, PROTOCOL_FIELDS_TAG) if key in version.tags}
        return cls({**values, **protocol})


@dataclass(frozen=True)
class Decision:
    """The gate's decision about a version, with everything it depends on."""

    name: str
    version: str
    metric: str
    value: float
    champion_before: str | None  # version, None if there was none
    champion_value: float | None  # None also if the champion has another protocol
    became_champion: bool
    lower_is_better: bool = True
    required: float | None = None  # the improvement, None if there was nothing to compare with
    required_from: str = ""
    checks: tuple[Check, ...] = ()
    forced: bool = False
    remeasured: Remeasured | None = None  # the champion, where its registered values are of another protocol
    untrained_value: float | None = None  # of the untrained model, where there was no champion
    unopposed: bool = False  # there was neither a champion nor a value of an untrained model

    @property
    def champion_after(self) -> str | None:
        return self.version if self.became_champion else self.champion_before

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def comparisons(self) -> list[Check]:
        """The passed checks that say what a value was compared with."""
        return [check for check in self.checks if check.passed and check.detail]

    @property
    def improvement(self) -> float | None:
        """How much better than the champion, or than the untrained model where there was no champion.

        Negative if worse, None if there is nothing to compare with.
        """
        value = self.untrained_value if self.champion_before is None else self.champion_value
        if value is None:
            return None
        return (value - self.value) * (1 if self.lower_is_better else -1)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "champion_after": self.champion_after}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Decision":
        """A recorded decision, of this or of an older version of the record."""
        values = json.loads(text)
        names = {item.name for item in fields(cls)}
        checks = tuple(Check(**check) for check in values.get("checks", ()))
        remeasured = Remeasured(**again) if (again := values.get("remeasured")) else None
        nested = {"checks": checks, "remeasured": remeasured}
        return cls(**{**{k: v for k, v in values.items() if k in names}, **nested})

    def __str__(self) -> str:
        """ "<outcome>: <why>" in one sentence."""
        if self.became_champion:
            outcome = "first champion" if self.champion_before is None else "new champion"
            outcome = f"forced, {outcome}" if self.forced else outcome
        else:
            outcome = "candidate only"
        # Failed checks come before the comparison: they decided.
        failed = [f"failed the check of {check.name}, {check.detail}" for check in self.failed]
        return f"{outcome}: {'; '.join([f'{self.metric} {self.value:.4g}', *failed, *self._comparison()])}"

    @property
    def _by_hand(self) -> str:
        return f"edt models promote {self.name}/{self.version} --force"

    def _comparison(self) -> list[str]:
        if self.champion_before is None:
            return self._comparison_without_champion()
        if self.improvement is None:
            text = f"champion {self.champion_before} was measured by another protocol"
            if self.remeasured is None or not self.remeasured.problem:
                return [text]
            return [
                f"{text} and cannot be measured again: {self.remeasured.problem} (`{self._by_hand}` decides by hand)"
            ]
        against = f"version {self.champion_before} has {self.champion_value:.4g}"
        against += f" (measured again {self.remeasured.how})" if self.remeasured is not None else ""
        return [f"{against}, {self._difference(self.improvement)}"]

    def _comparison_without_champion(self) -> list[str]:
        if self.unopposed:
            return ["there is no champion and no value of an untrained model to compare with"]
        if self.improvement is None:  # a decision of a version that did not compare with the untrained model
            return []
        text = f"the untrained model has {self.untrained_value:.4g}, {self._difference(self.improvement)}"
        if self.became_champion or self.failed:
            return [text]
        return [text, f"train longer (train.max_steps), or promote it by hand: `{self._by_hand}`"]

    def _difference(self, improvement: float) -> str:
        """ "better by 1, required 0.05 (1% of the champion's value)"."""
        text = f"better by {improvement:.3g}" if improvement > 0 else f"worse by {-improvement:.3g}"
        needed = "" if self.required is None else f", required {self.required:.3g} ({self.required_from})"
        return f"{text if improvement else 'the same'}{needed}"


def decide(
    version: Any,
    config: PromoteConfig,
    before: Any | None,
    checks: Sequence[Check] = (),
    force: bool = False,
    again: Remeasured | None = None,
) -> Decision:
    """Decide on a version, compared with the champion `before` by their tags if both have the same protocol.

    Without a champion it is compared with the untrained model, whose values are in its own tags.
    `again`: a champion measured again. It counts if it is `before`, and that was registered with another protocol.
    """
    value = metric_of(version, config.metric)
    if value is None:
        raise UserError(
            f"{version.name} version {version.version} has no metric {config.metric!r} recorded; "
            f"it has {', '.join(sorted(metrics_of(version))) or 'none'}"
        )
    passed = all(check.passed for check in checks)
    previous = None if before is None else str(before.version)
    common: dict[str, Any] = {"lower_is_better": config.lower_is_better, "checks": tuple(checks)}
    facts = (str(version.name), str(version.version), config.metric, value, previous)
    if before is not None and again is not None and again.version == previous and not _comparable(version, before):
        common["remeasured"] = before = again
    rival = before if before is not None else Untrained.of(version, config.metric)
    rival_value = metric_of(rival, config.metric) if rival is not None and _comparable(version, rival) else None
    if rival is None or rival_value is None:
        wins = passed and before is None
        common["unopposed"] = before is None
        return Decision(*facts, None, wins or force, **common, forced=force and not wins)
    required = required_improvement(config, rival_value, version, rival)
    wins = passed and required.by((rival_value - value) * (1 if config.lower_is_better else -1))
    common |= {"required": required.value, "required_from": required.origin}
    common["untrained_value"] = rival_value if before is None else None
    return Decision(*facts, None if before is None else rival_value, wins or force, **common, forced=force and not wins)


@dataclass(frozen=True)
class Required:
    """The improvement that a new champion needs over the value of its rival, and the rule that it comes from."""

    value: float
    origin: str
    exclusive: bool = False  # the improvement must be greater than `value`

    def by(self, improvement: float) -> bool:
        if self.exclusive or improvement <= 0:
            return improvement > max(self.value, 0)
        return improvement >= self.value * (1 - _ROUNDING)


def required_improvement(config: PromoteConfig, rival_value: float, version: Any, rival: Any) -> Required:
    """The required improvement of a version over its rival, the champion or the untrained model."""
    whose = "the untrained model's value" if isinstance(rival, Untrained) else "the champion's value"
    if config.margin is not None:
        return Required(config.margin * abs(rival_value), f"promote.margin {config.margin:g} of {whose}")
    spreads = [metric_of(item, f"{config.metric}_std") for item in (version, rival)]
    repeats = min(repeats_of(item) for item in (version, rival))
    if (limit := noise_of_repeats(spreads, repeats)) is not None:
        origin = f"more than {DEVIATIONS} standard deviations of {repeats} repeats"
        return Required(limit, origin, exclusive=True)
    return Required(DEFAULT_MARGIN * abs(rival_value), f"{DEFAULT_MARGIN:.0%} of {whose}")


def run_checks(config: PromoteConfig, version: Any, problems_of_files: Callable[[], list[str]]) -> tuple[Check, ...]:
    """The checks that a champion must pass besides its metric.

    Finite metrics, limits, artifacts, stored files, and for a distilled version its teacher.
    """
    metrics, tags = metrics_of(version), version.tags
    not_finite = [f"{name} is {value}" for name, value in sorted(metrics.items()) if not math.isfinite(value)]
    violations = [t for name, limits in sorted(config.require.items()) if (t := _violation(name, limits, metrics))]
    artifacts = {
        "the checkpoint artifact": (tags.get("edt.uri"), tags.get("edt.fingerprint"), tags.get("edt.digest")),
        "the evaluation artifact": tuple(tags.get(f"edt.evaluation{end}") for end in (".uri", "", ".digest")),
    }
    problems = {
        "the metrics": not_finite,
        "the required limits": violations,
        **{name: artifact_problems(*identity) for name, identity in artifacts.items()},
        "the registered files": problems_of_files(),
    }
    own = (Check(name, not texts, "; ".join(texts)[:500]) for name, texts in problems.items())
    return (*own, *_beside_teacher(config, version))


def _beside_teacher(config: PromoteConfig, version: Any) -> Iterator[Check]:
    """The comparisons of a distilled version with its teacher; none of another version."""
    teacher, value = TeacherRecord.of(version), metric_of(version, config.metric)
    if teacher is not None and value is not None:
        yield from (Check(*comparison) for comparison in teacher.comparisons(config, value))


def artifact_problems(uri: str | None, fingerprint: str | None, digest: str | None) -> list[str]:
    """The problems of an artifact that a version was made from. Checks the digest of every file."""
    if uri is None or digest is None:
        return ["its location is not recorded"]
    try:
        artifact = Artifact.read(uri)
        if (artifact.fingerprint, artifact.manifest.digest) != (fingerprint, digest):
            return [f"{uri} now contains another artifact"]
        return artifact.problems(deep=True)
    except (UserError, OSError) as error:
        return [str(error)]


def metrics_of(version: Any) -> dict[str, float]:
    """The recorded metrics of a version."""
    return {k.removeprefix(METRIC_TAG): float(v) for k, v in version.tags.items() if k.startswith(METRIC_TAG)}


def metric_of(version: Any, metric: str) -> float | None:
    """The recorded value of a metric of a version, or None."""
    text = version.tags.get(f"{METRIC_TAG}{metric}")
    return None if text is None else float(text)


def protocol_of(version: Any) -> Mapping[str, Any]:
    """The protocol of a version's metrics; empty for an older version that records only its digest."""
    return dict(json.loads(version.tags.get(PROTOCOL_FIELDS_TAG, "{}")))


def repeats_of(version: Any) -> int:
    """Number of sample sets that the metrics are means of. With one set, a recorded spread is over its parts."""
    return int(protocol_of(version).get("repeats", 1))


def _comparable(version: Any, before: Any) -> bool:
    protocol = version.tags.get(PROTOCOL_TAG)
    return protocol is not None and protocol == before.tags.get(PROTOCOL_TAG)


def _violation(name: str, limits: tuple[float | None, float | None], metrics: Mapping[str, float]) -> str:
    """How a metric violates its limits, or "". NaN violates every limit."""
    (least, most), value = limits, metrics.get(name)
    if value is None:
        return f"{name} was not measured"
    if least is not None and not value >= least:
        return f"{name} {value:.4g} is below {least:g}"
    if most is not None and not value <= most:
        return f"{name} {value:.4g} is above {most:g}"
    return ""

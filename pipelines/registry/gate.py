"""The gate: whether a version becomes champion. Decided from what is recorded of two versions, and from checks.

With v the value of the new version, c that of the champion and r the required improvement, a version becomes champion
if both were measured by one protocol, no check failed, and v is better than c by at least r:

    r = margin * |c|                    where `promote.margin` is set
    r = 2 * max(std of v, std of c)     else, where each is the mean of several repeats; then v is better by more than r
    r = 0.01 * |c|                      else
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from edt_core.errors import UserError
from edt_core.store.artifact import Artifact
from pipelines.config.schema import PromoteConfig

METRIC_TAG = "edt.metric."
PROTOCOL_TAG, PROTOCOL_FIELDS_TAG = "edt.protocol", "edt.protocol_fields"
DEFAULT_MARGIN, DEVIATIONS = 0.01, 2
_ROUNDING = 1e-9  # of the required improvement: 4.95 is 1 % better than 5


@dataclass(frozen=True)
class Check:
    """Something that every new champion must pass, and whether this one did."""

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Decision:
    """What the gate said of a version, with all that it went by."""

    name: str
    version: str
    metric: str
    value: float
    champion_before: str | None  # version, None where there was none
    champion_value: float | None  # None also where the champion was measured by another protocol
    became_champion: bool
    lower_is_better: bool = True
    required: float | None = None  # the improvement, None where there was nothing to compare with
    required_from: str = ""
    checks: tuple[Check, ...] = ()
    forced: bool = False

    @property
    def champion_after(self) -> str | None:
        return self.version if self.became_champion else self.champion_before

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def improvement(self) -> float | None:
        """How much better than the champion, negative where worse; None where there is nothing to compare with."""
        if self.champion_value is None:
            return None
        return (self.champion_value - self.value) * (1 if self.lower_is_better else -1)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "champion_after": self.champion_after}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Decision":
        """A recorded decision, of this or of an older version of the record."""
        values = json.loads(text)
        known = {field.name for field in fields(cls)}
        checks = tuple(Check(**check) for check in values.get("checks", ()))
        return cls(**{**{k: v for k, v in values.items() if k in known}, "checks": checks})

    def __str__(self) -> str:
        """ "<outcome>: <why>" in one sentence."""
        if self.became_champion:
            outcome = "first champion" if self.champion_before is None else "new champion"
            outcome = f"forced, {outcome}" if self.forced else outcome
        else:
            outcome = "candidate only"
        # What failed goes first where it decided.
        failed = [f"failed the check of {check.name}, {check.detail}" for check in self.failed]
        return f"{outcome}: {'; '.join([f'{self.metric} {self.value:.4g}', *failed, *self._comparison()])}"

    def _comparison(self) -> list[str]:
        if self.champion_before is None:
            return []
        if self.improvement is None:
            return [f"champion {self.champion_before} was measured by another protocol"]
        against = f"version {self.champion_before} has {self.champion_value:.4g}"
        difference = (
            f"better by {self.improvement:.3g}" if self.improvement > 0 else f"worse by {-self.improvement:.3g}"
        )
        if self.improvement == 0:
            difference = "the same"
        needed = "" if self.required is None else f", required {self.required:.3g} ({self.required_from})"
        return [f"{against}, {difference}{needed}"]


def decide(
    version: Any, config: PromoteConfig, before: Any | None, checks: Sequence[Check] = (), force: bool = False
) -> Decision:
    """Compare a version with the champion `before` by their tags: like with like, or not at all."""
    value = metric_of(version, config.metric)
    if value is None:
        raise UserError(
            f"{version.name} version {version.version} has no metric {config.metric!r} recorded; "
            f"it has {', '.join(sorted(metrics_of(version))) or 'none'}"
        )
    passed = all(check.passed for check in checks)
    previous = None if before is None else str(before.version)
    common: dict[str, Any] = {"lower_is_better": config.lower_is_better, "checks": tuple(checks)}
    known = (str(version.name), str(version.version), config.metric, value, previous)
    champion_value = metric_of(before, config.metric) if before is not None and _comparable(version, before) else None
    if before is None or champion_value is None:
        wins = passed and before is None
        return Decision(*known, None, wins or force, **common, forced=force and not wins)
    needed = required_improvement(config, champion_value, version, before)
    wins = passed and needed.by((champion_value - value) * (1 if config.lower_is_better else -1))
    common |= {"required": needed.value, "required_from": needed.origin}
    return Decision(*known, champion_value, wins or force, **common, forced=force and not wins)


@dataclass(frozen=True)
class Required:
    """How much better than the champion's value a new one has to be, and by which rule."""

    value: float
    origin: str
    exclusive: bool = False  # by more than that

    def by(self, improvement: float) -> bool:
        if self.exclusive or improvement <= 0:
            return improvement > max(self.value, 0)
        return improvement >= self.value * (1 - _ROUNDING)


def required_improvement(config: PromoteConfig, champion_value: float, *versions: Any) -> Required:
    """The rule that holds for these versions, the new one and the champion."""
    if config.margin is not None:
        return Required(
            config.margin * abs(champion_value), f"promote.margin {config.margin:g} of the champion's value"
        )
    spreads = [metric_of(version, f"{config.metric}_std") for version in versions]
    repeats = min(repeats_of(version) for version in versions)
    known = [spread for spread in spreads if spread is not None]
    if repeats > 1 and len(known) == len(spreads):
        origin = f"more than {DEVIATIONS} standard deviations of {repeats} repeats"
        return Required(DEVIATIONS * max(known), origin, exclusive=True)
    return Required(DEFAULT_MARGIN * abs(champion_value), f"{DEFAULT_MARGIN:.0%} of the champion's value")


def run_checks(config: PromoteConfig, version: Any, problems_of_files: Callable[[], list[str]]) -> tuple[Check, ...]:
    """Everything that a champion must pass, whatever its metric: numbers, limits, artifacts, and the stored files."""
    metrics, tags = metrics_of(version), version.tags
    odd = [f"{name} is {value}" for name, value in sorted(metrics.items()) if not math.isfinite(value)]
    beyond = [text for name, limits in sorted(config.require.items()) if (text := _beyond(name, limits, metrics))]
    artifacts = {
        "the checkpoint artifact": (tags.get("edt.uri"), tags.get("edt.fingerprint"), tags.get("edt.digest")),
        "the evaluation artifact": tuple(tags.get(f"edt.evaluation{end}") for end in (".uri", "", ".digest")),
    }
    found = {
        "the metrics": odd,
        "the required limits": beyond,
        **{name: artifact_problems(*where) for name, where in artifacts.items()},
        "the registered files": problems_of_files(),
    }
    return tuple(Check(name, not problems, "; ".join(problems)[:500]) for name, problems in found.items())


def artifact_problems(uri: str | None, fingerprint: str | None, digest: str | None) -> list[str]:
    """What is wrong with an artifact that a version says it was made from; every file is digested."""
    if uri is None or digest is None:
        return ["it is not recorded where it lies"]
    try:
        artifact = Artifact.read(uri)
        if (artifact.fingerprint, artifact.manifest.digest) != (fingerprint, digest):
            return [f"{uri} holds another artifact by now"]
        return artifact.problems(deep=True)
    except (UserError, OSError) as error:
        return [str(error)]


def metrics_of(version: Any) -> dict[str, float]:
    """The metrics that were recorded of a version."""
    return {k.removeprefix(METRIC_TAG): float(v) for k, v in version.tags.items() if k.startswith(METRIC_TAG)}


def metric_of(version: Any, metric: str) -> float | None:
    """The value of a metric that a version was registered with, or None."""
    text = version.tags.get(f"{METRIC_TAG}{metric}")
    return None if text is None else float(text)


def protocol_of(version: Any) -> Mapping[str, Any]:
    """The protocol that a version was measured by; empty for a version from before it was recorded in words."""
    return dict(json.loads(version.tags.get(PROTOCOL_FIELDS_TAG, "{}")))


def repeats_of(version: Any) -> int:
    """Sets of samples that the metrics are means of. A spread beside a metric of one set is one over its parts."""
    return int(protocol_of(version).get("repeats", 1))


def _comparable(version: Any, before: Any) -> bool:
    protocol = version.tags.get(PROTOCOL_TAG)
    return protocol is not None and protocol == before.tags.get(PROTOCOL_TAG)


def _beyond(name: str, limits: tuple[float | None, float | None], metrics: Mapping[str, float]) -> str:
    """How a metric breaks its limits, or nothing. One that is no number keeps none."""
    (least, most), value = limits, metrics.get(name)
    if value is None:
        return f"{name} was not measured"
    if least is not None and not value >= least:
        return f"{name} {value:.4g} is below {least:g}"
    if most is not None and not value <= most:
        return f"{name} {value:.4g} is above {most:g}"
    return ""

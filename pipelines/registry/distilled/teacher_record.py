"""What a distilled version records of its teacher: its values beside its own, and what the gate makes of them.

A student is compared with its teacher twice: with the teacher at the student's number of steps, which distillation must
beat, and with the teacher by its own protocol, from which it may be away by `promote.teacher_margin`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.config.schema import PromoteConfig

TEACHER_TAG = "edt.teacher"  # the record as JSON


@dataclass(frozen=True)
class Measurement:
    """The metrics of the teacher by one protocol. `evaluation` and `uri` are the artifact that has them.

    `calls`: forward passes of the model for an image, two a step with guidance.
    """

    sampler: str
    steps: int
    calls: int
    metrics: Mapping[str, float]
    evaluation: str
    uri: str

    @property
    def how(self) -> str:
        """ "25 steps of ancestral, 50 calls"."""
        return f"{self.steps} steps of {self.sampler}, {self.calls} calls"


@dataclass(frozen=True)
class TeacherRecord:
    """A teacher by its `location`, at the student's number of steps (`few`), and by its own protocol (`own`).

    `problem` says why it could not be measured; then there are no values.
    """

    location: str
    few: Measurement | None = None
    own: Measurement | None = None
    problem: str = ""

    @classmethod
    def of(cls, version: Any) -> "TeacherRecord | None":
        """That of a registered version; None if it was not distilled."""
        text = version.tags.get(TEACHER_TAG)
        if text is None:
            return None
        values = json.loads(text)
        few, own = (values.get(name) and Measurement(**values[name]) for name in ("few", "own"))
        return cls(values["location"], few or None, own or None, values.get("problem", ""))

    def to_json(self) -> str:
        """The record as a tag has it."""
        return json.dumps(asdict(self), sort_keys=True)

    def facts(self) -> dict[str, str]:
        """The teacher and its metrics, by how it was sampled, for `edt models show`."""
        values = {
            item.how: ", ".join(f"{name} {value:.4g}" for name, value in item.metrics.items())
            for item in (self.few, self.own)
            if item is not None
        }
        return {"model": self.location, **values, **({"problem": self.problem} if self.problem else {})}

    def comparisons(self, config: PromoteConfig, value: float) -> Iterator[tuple[str, bool, str]]:
        """(name, whether it is passed, detail) of each comparison, for a student with this value of the metric."""
        if self.few is None or self.own is None:
            yield "the teacher", False, f"{self.location} cannot be measured: {self.problem}"
            return
        few, own = self._value(self.few, config), self._value(self.own, config)
        better = value < few if config.lower_is_better else value > few
        yield self._compared(self.few, "the student's number of steps", better, f"{few:.4g}", config)
        if config.teacher_margin is None:
            yield self._compared(self.own, "its own protocol", True, f"{own:.4g}, no limit is set", config)
            return
        limit = own + config.teacher_margin * abs(own) * (1 if config.lower_is_better else -1)
        near = value <= limit if config.lower_is_better else value >= limit
        bound = "at most" if config.lower_is_better else "at least"
        text = f"{own:.4g}, {bound} {limit:.4g} is allowed (promote.teacher_margin {config.teacher_margin:g})"
        yield self._compared(self.own, "its own protocol", near, text, config)

    def _value(self, measurement: Measurement, config: PromoteConfig) -> float:
        return measurement.metrics.get(config.metric, float("nan"))

    def _compared(
        self, measurement: Measurement, how: str, passed: bool, value: str, config: PromoteConfig
    ) -> tuple[str, bool, str]:
        return f"the teacher by {how}", passed, f"{config.metric} {value} ({self.location}, {measurement.how})"

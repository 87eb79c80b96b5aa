"""The teacher of a distilled version, for the report: its values beside those of the student."""

from edt_core.config import Section
from pipelines.registry.distilled.teacher_record import Measurement, TeacherRecord


class TeacherRow(Section):
    """The teacher by one protocol, as `Measurement`."""

    sampler: str
    steps: int
    calls: int
    metrics: dict[str, float]

    @classmethod
    def of(cls, measurement: Measurement) -> "TeacherRow":
        """That of a measurement."""
        return cls(
            sampler=measurement.sampler,
            steps=measurement.steps,
            calls=measurement.calls,
            metrics=dict(measurement.metrics),
        )


class TeacherFacts(Section):
    """What the report shows of a teacher. `rows`: in the student's number of steps, and by its own protocol.

    `problem` says why there are no rows.
    """

    location: str
    rows: tuple[TeacherRow, ...] = ()
    problem: str = ""

    @classmethod
    def of(cls, record: TeacherRecord) -> "TeacherFacts":
        """Those of a version's record."""
        measured = (item for item in (record.few, record.own) if item is not None)
        return cls(location=record.location, rows=tuple(map(TeacherRow.of, measured)), problem=record.problem)

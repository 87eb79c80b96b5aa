"""The clock of a machine is wrong for a while, and is set back: schedules go on, and nothing is done twice."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipelines.schedule.record import Schedule, Schedules, State, Tick
from pipelines.schedule.server import Server

NOW = datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)
MINUTE, DAY = timedelta(minutes=1), timedelta(days=1)


@pytest.fixture
def schedules(tmp_path: Path) -> Schedules:
    schedules = Schedules.at(str(tmp_path))
    given = {"name": "nightly", "config": "quickstart", "store": str(tmp_path), "folder": str(tmp_path)}
    schedules.write(Schedule(**given, cron="* * * * *", timezone="UTC", since=NOW - DAY))
    return schedules


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[datetime]:
    """The ticks that a run was made of. MLflow has no part in it."""
    made: list[datetime] = []

    def run(self: Server, schedule: Schedule, state: State, tick: Tick) -> Tick:
        made.append(tick.tick)
        return tick.model_copy(update={"outcome": "finished"})

    monkeypatch.setattr(Server, "_run", run)
    monkeypatch.setattr("pipelines.schedule.server.record", lambda *_: None)
    return made


def attend(schedules: Schedules, now: datetime) -> str:
    said: list[str] = []
    Server(schedules, said.append, now=lambda: now).attend("nightly")
    return "\n".join(said)


@pytest.mark.parametrize("ahead", [2 * DAY, 73 * 365 * DAY], ids=["days", "years"])
def test_a_clock_that_was_years_ahead_does_not_stop_a_schedule(
    ahead: timedelta, schedules: Schedules, runs: list[datetime]
) -> None:
    attend(schedules, NOW + ahead)
    assert len(runs) == 1
    assert "warning: the clock was set back" in attend(schedules, NOW)
    assert len(runs) == 1  # what is due counts from now on
    assert "set back" not in attend(schedules, NOW + MINUTE)
    assert runs[1:] == [(NOW + MINUTE).replace(second=0)]


def test_a_schedule_of_the_future_begins_now(schedules: Schedules, runs: list[datetime]) -> None:
    """It was recorded while the clock was ahead."""
    schedules.write(schedules.read("nightly").model_copy(update={"since": NOW + 400 * DAY}))
    attend(schedules, NOW)
    attend(schedules, NOW + MINUTE)
    assert runs == [(NOW + MINUTE).replace(second=0)]


def test_a_clock_that_is_set_back_by_hours_makes_nothing_twice(schedules: Schedules, runs: list[datetime]) -> None:
    attend(schedules, NOW)
    for minutes in (-90, -89, -1, 0):
        assert "warning" not in attend(schedules, NOW + minutes * MINUTE)
    assert runs == [NOW.replace(second=0)]
    attend(schedules, NOW + MINUTE)
    assert len(runs) == 2

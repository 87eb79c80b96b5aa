"""Cron expressions as cron reads them, on top of APScheduler's triggers, and which of their ticks are due.

APScheduler counts weekdays from Monday and wants both day fields to match. Cron counts from Sunday (0 and 7), and where
both are restricted, either is enough. So each field is read here, and APScheduler gets lists of plain numbers.
"""

import calendar
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

from edt_core.errors import UserError

_MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_MONTHS = {name.lower(): number for number, name in enumerate(calendar.month_abbr) if name}
_DAYS = {name: number for number, name in enumerate(("sun", "mon", "tue", "wed", "thu", "fri", "sat"))}
_NO_NAMES: Mapping[str, int] = {}
_FIELDS = (
    ("minute", 0, 59, _NO_NAMES),
    ("hour", 0, 23, _NO_NAMES),
    ("day of month", 1, 31, _NO_NAMES),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 7, _DAYS),
)
_ITEM = re.compile(r"(?:(?P<all>\*)|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/(?P<step>\d+))?")
_LONGEST_MONTH = {2: 29, 4: 30, 6: 30, 9: 30, 11: 30}
_COUNTED = 1000


@dataclass(frozen=True)
class Due:
    """Ticks whose time has come: the latest of them, and how many came before it."""

    tick: datetime
    missed: int


@dataclass(frozen=True)
class Cron:
    """A cron expression of five fields in a time zone. Raises UserError for one that cron would refuse."""

    expression: str
    timezone: str

    def __post_init__(self) -> None:
        _ = self.zone, self.trigger

    @cached_property
    def zone(self) -> Any:
        from zoneinfo import ZoneInfo

        try:
            return ZoneInfo(self.timezone)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"no time zone {self.timezone!r}; name one as Europe/Berlin, or UTC") from error

    @cached_property
    def trigger(self) -> Any:
        """The APScheduler trigger that fires at these times."""
        from apscheduler.triggers.combining import OrTrigger
        from apscheduler.triggers.cron import CronTrigger

        minute, hour, day, month, weekday = self._fields()
        texts = self._texts()
        shared: dict[str, Any] = {"minute": _list(minute), "hour": _list(hour), "month": _list(month)}
        shared["timezone"] = self.zone
        by_day = {**shared, "day": _list(day)}
        weekdays = _list({(number - 1) % 7 for number in weekday})  # APScheduler's 0 is Monday
        if texts[2].startswith("*") or texts[4].startswith("*"):
            return CronTrigger(**by_day, day_of_week=weekdays)
        return OrTrigger([CronTrigger(**by_day), CronTrigger(**shared, day_of_week=weekdays)])

    def after(self, moment: datetime) -> datetime:
        """The first tick after a moment."""
        while True:
            moment = (moment.astimezone(UTC) + timedelta(microseconds=1)).astimezone(self.zone)
            tick: datetime = self.trigger.get_next_fire_time(None, moment)
            # When clocks are set back an hour comes twice: a fixed time is meant once.
            if not (tick.fold and self._texts()[1][0] != "*"):
                return tick
            moment = tick

    def due(self, handled: datetime, now: datetime) -> Due | None:
        """The ticks after `handled` up to `now`, as one; None where there are none. Counts up to a thousand."""
        count, tick = 0, self.after(handled)
        if tick > now:
            return None
        latest = tick
        while tick <= now and count < _COUNTED:
            latest, count, tick = tick, count + 1, self.after(tick)
        if tick <= now:
            latest = self._latest(now)
        return Due(latest, count - 1)

    def _latest(self, now: datetime) -> datetime:
        """The last tick up to `now`, where there are very many."""
        span = timedelta(minutes=1)
        while (tick := self.after(now - span)) > now:
            span *= 2
        while (following := self.after(tick)) <= now:
            tick = following
        return tick

    def _texts(self) -> list[str]:
        return _MACROS.get(self.expression.strip().lower(), self.expression).split()

    def _fields(self) -> list[set[int]]:
        texts = self._texts()
        if len(texts) != len(_FIELDS):
            raise UserError(
                f"the cron expression {self.expression!r} has {len(texts)} fields; give 5: minute, hour, day of month, "
                "month, day of week, as '0 3 * * 0' for Sundays at three"
            )
        fields = [set(_numbers(text, *field)) for text, field in zip(texts, _FIELDS, strict=True)]
        longest = max(_LONGEST_MONTH.get(month, 31) for month in fields[3])
        if min(fields[2]) > longest and texts[4].startswith("*"):
            raise UserError(
                f"the cron expression {self.expression!r} never comes: its months have {longest} days at most; "
                "choose an earlier day"
            )
        return fields


def _numbers(text: str, field: str, lowest: int, highest: int, names: Mapping[str, int]) -> Iterator[int]:
    """All numbers that one field means."""

    def wrong(reason: str) -> UserError:
        return UserError(
            f"the cron field {field} {text!r} {reason}; use numbers {lowest} to {highest}, ranges 1-5, lists 1,3 or "
            f"steps */2{', or names as ' + next(iter(names)) if names else ''}"
        )

    def number(word: str) -> int:
        value = names.get(word.lower(), int(word) if word.isascii() and word.isdigit() else -1)
        if not lowest <= value <= highest:
            raise wrong(f"has {word!r} in it")
        return value

    for item in text.split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise wrong(f"has {item!r} in it")
        step = int(match["step"] or 1)
        if step < 1:
            raise wrong("has a step of 0")
        if match["all"]:
            first, last = lowest, 6 if names is _DAYS else highest
        else:
            first = number(match["first"])
            open_end = highest if match["step"] else first  # 5/10 is 5-59/10
            last = number(match["last"]) if match["last"] else open_end
            if names is _DAYS and match["last"] and match["last"].lower() == "sun":
                last = 7
        if first > last:
            raise wrong(f"has a range that runs backwards, {item!r}")
        yield from range(first, last + 1, step)


def _list(numbers: set[int]) -> str:
    return ",".join(map(str, sorted(numbers)))

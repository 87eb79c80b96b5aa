"""Cron expressions with the semantics of Debian's cron (parsed by cronsim), and the ticks that are due."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import islice, takewhile
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
_FIELDS = {
    "minute": "numbers 0 to 59",
    "hour": "numbers 0 to 23",
    "day of month": "numbers 1 to 31",
    "month": "numbers 1 to 12, or names such as jan",
    "day of week": "numbers 0 to 7, or names such as sun",
}
_UNTIL_SUNDAY = re.compile(r"-sun\b", re.IGNORECASE)  # cronsim starts the week on Sunday: fri-sun becomes fri-7
_ONE_VALUE = re.compile(r"(?<!\w)(\w+)-\1/0*[1-9]\d*(?!\w)", re.IGNORECASE)  # cronsim reads 5-5/2 as 5/2
_MAX_COUNTED = 1000


@dataclass(frozen=True)
class Due:
    """Ticks that are due: the latest one, and the number of earlier ones."""

    tick: datetime
    missed: int


@dataclass(frozen=True)
class Cron:
    """A cron expression of five fields in a time zone. Raises UserError if cron would reject it."""

    expression: str
    timezone: str

    def __post_init__(self) -> None:
        _ = self.zone
        self._check()

    @cached_property
    def zone(self) -> Any:
        from zoneinfo import ZoneInfo

        try:
            return ZoneInfo(self.timezone)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"there is no time zone {self.timezone!r}; use a name such as Europe/Berlin, or UTC"
            ) from error

    def after(self, moment: datetime) -> datetime:
        """The first tick after a moment."""
        return next(self._ticks(moment))

    def due(self, handled: datetime, now: datetime) -> Due | None:
        """The ticks after `handled` up to `now` as one `Due`, None if there are none. Counts at most 1,000."""
        from cronsim import CronSim

        ticks = list(islice(takewhile(lambda tick: tick <= now, self._ticks(handled)), _MAX_COUNTED))
        if not ticks:
            return None
        if len(ticks) == _MAX_COUNTED:
            end = (now + timedelta(seconds=1)).replace(microsecond=0)
            ticks[-1] = next(CronSim(self._text, end.astimezone(self.zone), reverse=True))
        return Due(ticks[-1], len(ticks) - 1)

    def _ticks(self, moment: datetime) -> Iterator[datetime]:
        from cronsim import CronSim

        # When clocks are set back, one hour occurs twice. cronsim then starts with ticks of the first occurrence.
        start = moment.astimezone(UTC)
        return (tick for tick in CronSim(self._text, moment.astimezone(self.zone)) if tick.astimezone(UTC) > start)

    @cached_property
    def _text(self) -> str:
        text = _MACROS.get(self.expression.strip().lower(), self.expression)
        return _UNTIL_SUNDAY.sub("-7", _ONE_VALUE.sub(r"\1", text))

    def _check(self) -> None:
        """Raise UserError, naming the field, if cronsim cannot parse the expression."""
        from cronsim import CronSim, CronSimError

        fields = self._text.split()
        if len(fields) != len(_FIELDS):
            raise UserError(
                f"the cron expression {self.expression!r} has {len(fields)} fields, but needs "
                f"{len(_FIELDS)}: {', '.join(_FIELDS)}; for example '0 3 * * 0' for Sundays at 03:00"
            )
        start = datetime(2000, 1, 1, tzinfo=UTC)
        for place, (field, values) in enumerate(_FIELDS.items()):
            try:
                CronSim(" ".join(text if index == place else "*" for index, text in enumerate(fields)), start)
            except (CronSimError, ValueError) as error:  # ValueError: a number of thousands of digits
                raise UserError(
                    f"the cron field {field} {fields[place]!r} is invalid; use {values}, a list (1,3), a range (1-5, "
                    "ascending) or a step (*/2, at least 1)"
                ) from error
        try:
            next(CronSim(self._text, start))
        except (CronSimError, StopIteration) as error:
            raise UserError(
                f"the cron expression {self.expression!r} never matches: none of its months has such a day; choose an "
                "earlier day or more months"
            ) from error

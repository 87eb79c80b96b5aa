"""Cron expressions as Debian's cron reads them, by cronsim, and which of their ticks are due."""

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
    "month": "numbers 1 to 12, or names as jan",
    "day of week": "numbers 0 to 7, or names as sun",
}
_UNTIL_SUNDAY = re.compile(r"-sun\b", re.IGNORECASE)  # for cronsim Sunday is the first day only: fri-sun is fri-7
_ONE_VALUE = re.compile(r"(?<!\w)(\w+)-\1/0*[1-9]\d*(?!\w)", re.IGNORECASE)  # cronsim takes 5-5/2 for 5/2
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
        _ = self.zone
        self._check()

    @cached_property
    def zone(self) -> Any:
        from zoneinfo import ZoneInfo

        try:
            return ZoneInfo(self.timezone)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"no time zone {self.timezone!r}; name one as Europe/Berlin, or UTC") from error

    def after(self, moment: datetime) -> datetime:
        """The first tick after a moment."""
        return next(self._ticks(moment))

    def due(self, handled: datetime, now: datetime) -> Due | None:
        """The ticks after `handled` up to `now`, as one; None where there are none. Counts up to a thousand."""
        from cronsim import CronSim

        ticks = list(islice(takewhile(lambda tick: tick <= now, self._ticks(handled)), _COUNTED))
        if not ticks:
            return None
        if len(ticks) == _COUNTED:  # there may be very many more
            end = (now + timedelta(seconds=1)).replace(microsecond=0)
            ticks[-1] = next(CronSim(self._text, end.astimezone(self.zone), reverse=True))
        return Due(ticks[-1], len(ticks) - 1)

    def _ticks(self, moment: datetime) -> Iterator[datetime]:
        from cronsim import CronSim

        # In the hour that comes twice when clocks are set back, cronsim begins with ticks of the first time.
        began = moment.astimezone(UTC)
        return (tick for tick in CronSim(self._text, moment.astimezone(self.zone)) if tick.astimezone(UTC) > began)

    @cached_property
    def _text(self) -> str:
        text = _MACROS.get(self.expression.strip().lower(), self.expression)
        return _UNTIL_SUNDAY.sub("-7", _ONE_VALUE.sub(r"\1", text))

    def _check(self) -> None:
        """Raise UserError that names the field which cronsim cannot read."""
        from cronsim import CronSim, CronSimError

        fields = self._text.split()
        if len(fields) != len(_FIELDS):
            raise UserError(
                f"the cron expression {self.expression!r} has {len(fields)} fields; give {len(_FIELDS)}: "
                f"{', '.join(_FIELDS)}, as '0 3 * * 0' for Sundays at three"
            )
        start = datetime(2000, 1, 1, tzinfo=UTC)
        for place, (field, known) in enumerate(_FIELDS.items()):
            try:
                CronSim(" ".join(text if here == place else "*" for here, text in enumerate(fields)), start)
            except (CronSimError, ValueError) as error:  # ValueError: a number of thousands of digits
                raise UserError(
                    f"the cron field {field} {fields[place]!r} cannot be read; use {known}, lists 1,3, ranges 1-5 "
                    "(none that runs backwards) or steps */2 (never a step of 0)"
                ) from error
        try:
            next(CronSim(self._text, start))
        except (CronSimError, StopIteration) as error:
            raise UserError(
                f"the cron expression {self.expression!r} never comes: none of its months has such a day; choose an "
                "earlier day, or more months"
            ) from error

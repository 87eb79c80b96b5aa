"""Notifications of ticks that no run reports: skipped, lost, killed, or failed before the run could start."""

from collections.abc import Callable

from edt_core.errors import UserError
from pipelines.config.schema import NotifyConfig, load_config, notify_config
from pipelines.notification import Notification, notify
from pipelines.schedule.record import UNCHANGED, Schedule, Tick


def notify_of_tick(schedule: Schedule, tick: Tick, warn: Callable[[str], None]) -> None:
    """Send the notification of an ended tick, unless the run of the tick has sent one itself. Never raises."""
    event, message = ("", "") if tick.reported else _event(tick)
    if event:
        details = {"status": tick.outcome, "tick": tick.tick.isoformat(timespec="seconds"), "log": tick.log}
        notify(_config(schedule), [Notification(event, schedule.name, message, details)], warn)


def _config(schedule: Schedule) -> NotifyConfig:
    try:
        if schedule.retrain:  # the rest of its configuration is that of the champion's run, which the command reads
            return notify_config(schedule.assignments)
        return load_config(schedule.config, schedule.assignments, schedule.store).notify
    except (UserError, OSError):  # the run could not read its configuration either
        return NotifyConfig()


def _event(tick: Tick) -> tuple[str, str]:
    """The event of a tick that no run reported, and its message; "" if there is none."""
    if tick.outcome == UNCHANGED:
        return "nothing_to_do", "the images have not changed since the last finished run"
    if tick.outcome == "lost":
        return "failed", f"the run was killed before it ended; its log is {tick.log}"
    if tick.outcome == "failed":
        return "failed", tick.error or "the run did not start"
    return "", ""

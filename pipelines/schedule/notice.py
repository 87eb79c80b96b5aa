"""Notifications of ticks that no run reports: skipped, lost, or failed before the run could start."""

from collections.abc import Callable

from edt_core.errors import UserError
from pipelines.config.schema import NotifyConfig, load_config
from pipelines.notification import Notification, notify
from pipelines.schedule.record import UNCHANGED, Schedule, Tick


def notify_of_tick(schedule: Schedule, tick: Tick, warn: Callable[[str], None]) -> None:
    """Send the notification of an ended tick, unless the run of the tick has sent one itself. Never raises."""
    try:
        config, readable = NotifyConfig(), True
        if not schedule.retrain:  # its configuration is that of the champion's run, which the command reads
            config = load_config(schedule.config, schedule.assignments, schedule.store).notify
    except (UserError, OSError):  # the run could not read its configuration either
        config, readable = NotifyConfig(), False
    event, message = _event(tick, readable)
    if event:
        details = {"status": tick.outcome, "tick": tick.tick.isoformat(timespec="seconds"), "log": tick.log}
        notify(config, [Notification(event, schedule.name, message, details)], warn)


def _event(tick: Tick, readable: bool) -> tuple[str, str]:
    """The event of a tick and its message; "" if its run reports it."""
    if tick.outcome == UNCHANGED:
        return "nothing_to_do", "the images have not changed since the last finished run"
    if tick.outcome == "lost":
        return "failed", f"the run was killed before it ended; its log is {tick.log}"
    started = tick.pid is not None
    if tick.outcome == "failed" and not (started and readable):
        return "failed", tick.error or "the run did not start"
    return "", ""

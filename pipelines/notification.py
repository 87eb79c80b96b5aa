"""Notifications: what became of a run, as JSON to a URL or through a service of Apprise.

The addresses come from an environment variable and are never written: not to a record, a log, or an error message.
A notification that cannot be delivered is a warning. It never fails a run, and never delays one for longer than
`notify.timeout_s`.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from edt_core.environment import utc
from edt_core.network.answers import in_background
from edt_core.printing.redaction import redacted_values

if TYPE_CHECKING:
    from pipelines.config.schema import NotifyConfig
    from pipelines.outcome import Outcome

_HTTP = ("http", "https")


class DeliveryError(Exception):
    """A notification that was not delivered. Its text names no part of an address that may be secret."""


@dataclass(frozen=True)
class Notification:
    """One event of a pipeline. `details` are JSON values for programs, `message` is one sentence for people."""

    event: str
    pipeline: str
    message: str
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"edt: {self.pipeline} {self.event.replace('_', ' ')}"

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that is posted, without credentials."""
        values = {
            "event": self.event,
            "pipeline": self.pipeline,
            "title": self.title,
            "message": self.message,
            "time": utc(),
            **self.details,
        }
        safe: dict[str, Any] = redacted_values(values)
        return safe


def notify(config: "NotifyConfig", notifications: Sequence[Notification], warn: Callable[[str], None]) -> None:
    """Send notifications of the events in `notify.events` to every address. Reports failures to `warn`; never raises.

    Addresses are served side by side, and one that is silent is given up after `notify.timeout_s` seconds.
    """
    deadline = time.monotonic() + config.timeout_s
    selected = [notification for notification in notifications if notification.event in config.events]
    addresses = os.environ.get(config.variable, "").split() if selected else []
    deliveries = [
        (address, notification, in_background(partial(_deliver, address, notification, config.timeout_s)))
        for address in addresses
        for notification in selected
    ]
    for address, notification, delivery in deliveries:
        if problem := _problem(delivery, config.timeout_s, deadline):
            warn(f"the notification {notification.event!r} was not delivered to {public_name(address)}: {problem}")


def _problem(delivery: "Future[None]", timeout_s: float, deadline: float) -> str:
    """Why a delivery failed, "" if it did not. All deliveries have one deadline."""
    try:
        delivery.result(max(0.0, deadline - time.monotonic()))
    except FutureTimeout:
        return f"no answer in {timeout_s:g} s (notify.timeout_s)"
    except DeliveryError as error:
        return str(error)
    except Exception as error:  # the text of a library's error may hold the address
        return type(error).__name__
    return ""


def public_name(address: str) -> str:
    """What may be shown of an address: scheme, host and port of an http URL, and the scheme alone of a service."""
    scheme = _scheme(address)
    if not scheme:
        return "an address without a scheme"
    if scheme.lower() not in _HTTP:
        return f"{scheme}://..."
    try:
        parts = urlsplit(address)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return f"{scheme}://..."
    return f"{scheme}://{parts.hostname or ''}{port}"


def _scheme(address: str) -> str:
    """The scheme of a URL, "" if there is none. What stands before a later `://` may be a secret."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]{0,30})://", address)
    return match[1] if match else ""


def _deliver(address: str, notification: Notification, timeout_s: float) -> None:
    scheme = _scheme(address)
    if not scheme:
        raise DeliveryError("it is not a URL; use https://... or a service of Apprise such as slack://...")
    if scheme.lower() in _HTTP:
        _post(address, notification, timeout_s)
    else:
        _send_by_apprise(address, notification)


def _post(address: str, notification: Notification, timeout_s: float) -> None:
    """POST the notification as JSON. A redirect is not followed: it may lead into the network of the cluster."""
    import requests

    try:
        answer = requests.post(
            address, json=notification.to_dict(), timeout=timeout_s, allow_redirects=False, stream=True
        )
    except requests.exceptions.Timeout as error:
        raise DeliveryError(f"no answer in {timeout_s:g} s (notify.timeout_s)") from error
    except requests.exceptions.RequestException as error:
        raise DeliveryError(f"the connection failed ({type(error).__name__})") from error
    with answer:
        if answer.is_redirect:
            raise DeliveryError(
                f"the server answered with a redirect ({answer.status_code}), which is not followed; "
                "use the address that it redirects to"
            )
        if not answer.ok:
            raise DeliveryError(f"the server answered with status {answer.status_code}")


def _send_by_apprise(address: str, notification: Notification) -> None:
    """Send through a service of Apprise, as `slack://...`."""
    import logging

    try:
        import apprise
    except ImportError as error:
        raise DeliveryError("it needs the package apprise: pip install 'edt-pipeline[notify]'") from error
    logging.getLogger("apprise").setLevel(logging.CRITICAL)  # its messages hold parts of the address
    service = apprise.Apprise(asset=apprise.AppriseAsset(http_redirects=False))
    if not service.add(address):
        raise DeliveryError("Apprise does not know this service, or the address is incomplete")
    values = notification.to_dict()
    lines = [values["message"], *(f"{key}: {values[key]}" for key in ("link", "report") if values.get(key))]
    if not service.notify(body="\n".join(lines), title=values["title"]):
        raise DeliveryError("the service did not accept it")


def of_outcome(pipeline: str, outcome: "Outcome") -> list[Notification]:
    """The notifications of a run that has ended: failed, nothing to do, or one decision for each model."""
    about = {"run_id": outcome.run_id, "link": outcome.link, "status": outcome.status}
    if outcome.failures:
        problems = "; ".join(f"{step}: {error}" for step, error in outcome.failures.items())
        return [Notification("failed", pipeline, problems, {**about, "steps": sorted(outcome.failures)})]
    if outcome.stopped:
        return []
    if not outcome.executed:
        message = f"all {outcome.reused} steps were reused; nothing has changed"
        return [Notification("nothing_to_do", pipeline, message, about)]
    models = outcome.to_dict()["models"]
    return [
        Notification(
            "promoted" if decision.became_champion else "refused",
            pipeline,
            f"{name} version {decision.version}: {decision}",
            {**about, "model": name, **models[name]},
        )
        for name, decision in outcome.decisions.items()
    ]


def of_error(pipeline: str, error: BaseException) -> Notification:
    """The notification of a run that ended before it had an outcome."""
    return Notification("failed", pipeline, f"{error}" or type(error).__name__, {"status": "failed"})

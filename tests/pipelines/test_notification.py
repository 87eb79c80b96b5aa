"""Notifications: JSON by POST, services of Apprise, and receivers that misbehave."""

import json
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines import notification
from pipelines.config.schema import NotifyConfig
from pipelines.notification import Notification, notify, of_error, of_outcome, public_name
from pipelines.outcome import Outcome
from pipelines.registry.gate import Decision
from pipelines.schedule import notice
from pipelines.schedule.record import UNCHANGED, Tick, new_schedule
from tests.support.servers import receiver
from tests.support.small import edt, environment

EVENT = Notification("promoted", "nightly", "digits version 3: new champion", {"model": "digits", "version": "3"})


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`send(addresses, **config)` notifies of EVENT and returns the warnings."""

    def call(addresses: str, **fields: object) -> list[str]:
        warnings: list[str] = []
        monkeypatch.setenv("EDT_NOTIFY_URLS", addresses)
        notify(NotifyConfig(**fields), [EVENT], warnings.append)
        return warnings

    return call


def test_a_url_receives_json(send) -> None:
    with receiver() as (url, bodies):
        assert send(f"{url}/hook") == []
    (posted,) = map(json.loads, bodies)
    assert posted.pop("time")
    assert posted == {
        "event": "promoted",
        "pipeline": "nightly",
        "title": "edt: nightly promoted",
        "message": "digits version 3: new champion",
        "model": "digits",
        "version": "3",
    }


def test_every_address_is_served_though_others_fail(send) -> None:
    with receiver(status=500) as (broken, _), receiver() as (url, bodies):
        warnings = send(f"{broken}/a {url}/b nonsense")
    assert len(bodies) == 1
    assert [warning.split(": ", 1)[1] for warning in warnings] == [
        "the server answered with status 500",
        "it is not a URL; use https://... or a service of Apprise such as slack://...",
    ]


def test_only_selected_events_are_sent(send) -> None:
    with receiver() as (url, bodies):
        send(url, events=("failed",))
        assert bodies == []
        send(url, events=("failed", "promoted"))
        assert len(bodies) == 1


def test_without_the_variable_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDT_NOTIFY_URLS", raising=False)
    monkeypatch.setattr(notification, "_deliver", lambda *_: pytest.fail("nothing to send to"))
    notify(NotifyConfig(), [EVENT], pytest.fail)


def test_another_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as (url, bodies):
        monkeypatch.setenv("TEAM_HOOK", url)
        notify(NotifyConfig(variable="TEAM_HOOK"), [EVENT], pytest.fail)
    assert len(bodies) == 1


@pytest.mark.parametrize("scheme", ["http", "json"])
def test_a_redirect_is_not_followed(send, scheme: str) -> None:
    """An address outside must not make the run call a service inside its network."""
    with receiver() as (inside, reached), receiver(status=302, headers={"Location": f"{inside}/admin"}) as (url, hit):
        (warning,) = send(url.replace("http", scheme, 1))
    assert hit
    assert reached == []
    assert ("redirect (302), which is not followed" if scheme == "http" else "did not accept it") in warning


def test_a_silent_receiver_is_given_up(send) -> None:
    """The run continues after `timeout_s`, not when the receiver answers."""
    with receiver(wait=threading.Event()) as (url, bodies):
        started = time.monotonic()
        (warning,) = send(url, timeout_s=0.2)
        assert time.monotonic() - started < 50  # the receiver waits for 60 s
    assert bodies
    assert "no answer in 0.2 s (notify.timeout_s)" in warning


def test_silent_receivers_have_one_deadline(send) -> None:
    with receiver(wait=threading.Event()) as (url, _):
        started = time.monotonic()
        warnings = send(" ".join([f"{url}/{number}" for number in range(200)]), timeout_s=0.5)
        assert time.monotonic() - started < 60  # one after the other they would take 100 s
    assert len(warnings) == 200


def test_a_receiver_that_is_down(send) -> None:
    with receiver() as (url, _):
        pass
    (warning,) = send(url)
    assert "the connection failed (ConnectionError)" in warning


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (
            "https://user:hunter22@hooks.example.org:8443/T0/B0/XXhookXX?token=XXtokenXX",
            "https://hooks.example.org:8443",
        ),
        ("slack://XXtokenAXX/XXtokenBXX/XXtokenCXX", "slack://..."),
        ("http://host:port/XXhookXX", "http://..."),
        ("XXnoschemeXX", "an address without a scheme"),
        ("hooks.example.org/XXhookXX?next=https://x", "an address without a scheme"),
    ],
)
def test_no_part_of_an_address_that_may_be_secret_is_shown(send, monkeypatch, capfd, address: str, shown: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(f"cannot reach {address}")

    monkeypatch.setattr(notification, "_post", refuse)
    monkeypatch.setattr(notification, "_send_by_apprise", refuse)
    (warning,) = send(address)
    assert public_name(address) == shown
    assert f"to {shown}:" in warning
    printed = "".join([warning, *capfd.readouterr()])
    assert not any(secret in printed for secret in ("hunter22", "XX"))


def test_a_service_of_apprise(send) -> None:
    """`json://` stands for every service: the library sends it."""
    with receiver() as (url, bodies):
        assert send(url.replace("http", "json", 1)) == []
    (posted,) = map(json.loads, bodies)
    assert (posted["title"], posted["message"]) == ("edt: nightly promoted", "digits version 3: new champion")


def test_an_unknown_service(send, capfd) -> None:
    (warning,) = send("nosuchservice://XXtokenXX")
    assert "Apprise does not know this service, or the address is incomplete" in warning
    assert "XX" not in "".join([warning, *capfd.readouterr()])


def _decision(version: str, champion: bool) -> Decision:
    return Decision("digits", version, "fd_classifier", 1.5, "1", 2.0, champion, required=0.02, required_from="1 %")


def test_the_events_of_an_outcome() -> None:
    outcome = Outcome("r1", "sqlite:///x", "http://here/r1", executed=5, reused=2)
    outcome.decisions = {"a": _decision("2", True), "b": _decision("4", False)}
    outcome.metrics = {name: ({}, {"fd_classifier": 1.5}) for name in ("a", "b")}
    promoted, refused = of_outcome("nightly", outcome)
    assert (promoted.event, refused.event) == ("promoted", "refused")
    assert promoted.message == f"a version 2: {outcome.decisions['a']}"
    assert promoted.to_dict()["link"] == "http://here/r1"
    assert json.loads(json.dumps(refused.to_dict()))["version"] == "4"


def test_an_outcome_without_work_says_that_nothing_was_to_do() -> None:
    outcome = Outcome("r1", "sqlite:///x", executed=0, reused=12)
    outcome.decisions = {"a": _decision("2", True)}
    (nothing,) = of_outcome("nightly", outcome)
    assert (nothing.event, nothing.message) == ("nothing_to_do", "all 12 steps were reused; nothing has changed")


def test_failures_and_stops() -> None:
    outcome = Outcome("r1", "sqlite:///x", executed=1, failures={"train a": ValueError("no memory")})
    (failed,) = of_outcome("nightly", outcome)
    assert (failed.event, failed.message) == ("failed", "train a: no memory")
    outcome = Outcome("r1", "sqlite:///x", executed=1, stopped="train a: stopped at step 3")
    assert of_outcome("nightly", outcome) == []
    assert of_error("nightly", ValueError("no such folder")).message == "no such folder"


def test_credentials_in_a_message_are_removed() -> None:
    message = "cannot read s3://me:hunter22secret@host/b"
    assert "hunter22" not in json.dumps(Notification("failed", "n", message).to_dict())


def test_the_section_is_no_part_of_a_record_at_its_defaults() -> None:
    from edt_core.config import recorded_fields
    from pipelines.config.schema import load_config

    assert "notify" not in recorded_fields(load_config("quickstart"))
    assert SimpleNamespace(**load_config("quickstart").model_dump()).notify["variable"] == "EDT_NOTIFY_URLS"


NOW = datetime(2026, 5, 1, 3, tzinfo=UTC)


def _tick(outcome: str, **fields: object) -> Tick:
    return Tick(tick=NOW, started=NOW, outcome=outcome, **fields)


LOST = _tick("lost", pid=7, log="a.log")


@pytest.mark.parametrize(
    ("config", "tick", "event", "message"),
    [
        ("quickstart", _tick(UNCHANGED), "nothing_to_do", "the images have not changed since the last finished run"),
        ("quickstart", _tick(UNCHANGED, pid=7, reported=True), None, ""),
        ("quickstart", LOST, "failed", "the run was killed before it ended; its log is a.log"),
        ("quickstart", _tick("failed", error="no such bucket"), "failed", "no such bucket"),
        ("gone.yaml", _tick("failed", pid=7, error="no configuration"), "failed", "no configuration"),
        ("quickstart", _tick("failed", pid=7, error="exit code -9"), "failed", "exit code -9"),
        ("quickstart", _tick("failed", pid=7, error="exit code 1", reported=True), None, ""),
        ("quickstart", _tick("finished", pid=7, reported=True), None, ""),
    ],
)
def test_ticks(monkeypatch: pytest.MonkeyPatch, config: str, tick: Tick, event: str | None, message: str) -> None:
    """A run that reported its outcome has sent the notification itself; one that was killed could not."""
    sent: list[Notification] = []
    monkeypatch.setattr(notice, "notify", lambda config, notifications, warn: sent.extend(notifications))
    schedule = new_schedule("nightly", "quickstart", [], "store", "0 3 * * *", "UTC")
    schedule = schedule.model_copy(update={"config": config})
    notice.notify_of_tick(schedule, tick, pytest.fail)
    assert [(n.event, n.message) for n in sent] == ([(event, message)] if event else [])


def test_a_retraining_that_was_killed_is_sent_by_the_settings_of_its_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[NotifyConfig] = []
    monkeypatch.setattr(notice, "notify", lambda config, notifications, warn: configs.append(config))
    sets = ["notify.variable=TEAM_HOOK", "train.lr=0.1"]
    schedule = new_schedule(None, "digits", sets, "store", "0 3 * * *", "UTC", retrain=True)
    notice.notify_of_tick(schedule, LOST, pytest.fail)
    assert [config.variable for config in configs] == ["TEAM_HOOK"]


def test_a_failed_retraining_is_sent_once_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its schedule names a model, which is no configuration: that is not a failure of the tick."""
    with receiver() as (url, bodies):
        done = edt("retrain", "digits", "--store", str(tmp_path), env={**environment(), "EDT_NOTIFY_URLS": url})
        assert done.returncode == 2
        assert edt("retrain", "digits", "--plan", "--store", str(tmp_path)).returncode == 2
    (posted,) = map(json.loads, bodies)
    assert (posted["event"], posted["pipeline"]) == ("failed", "digits")
    monkeypatch.setattr(notice, "notify", lambda *_: pytest.fail("the command has sent it"))
    schedule = new_schedule(None, "digits", [], "store", "0 3 * * *", "UTC", retrain=True)
    notice.notify_of_tick(schedule, _tick("failed", pid=7, error="exit code 2", reported=True), pytest.fail)


def test_a_command_that_fails_before_its_run_sends_it(tmp_path: Path) -> None:
    """With the receiver down, message and exit code are the same, and a warning is added."""
    command = ["run", "--set", "source.kind=auto", "--set", f"source.path={tmp_path}/gone", "--store", f"{tmp_path}/s"]
    with receiver() as (url, bodies):
        variables = {**environment(), "EDT_NOTIFY_URLS": f"{url}/XXtokenXX"}
        first = edt(*command, env=variables)
    (posted,) = map(json.loads, bodies)
    second = edt(*command, env=variables)
    assert first.returncode == second.returncode == 2
    assert (posted["event"], posted["pipeline"]) == ("failed", "quickstart")
    assert "gone" in posted["message"]
    printed = second.stdout + second.stderr
    assert "warning: the notification 'failed' was not delivered to http://127.0.0.1:" in printed
    assert "XX" not in first.stdout + first.stderr + printed

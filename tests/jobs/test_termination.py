"""SIGTERM does what Ctrl-C does: the same orderly end, whoever handles Ctrl-C at that moment."""

import signal
import threading
from collections.abc import Iterator

import pytest

from jobs.runtime.exit_code import exit_code
from jobs.runtime.progress import Interrupts
from jobs.runtime.termination import term_interrupts, term_kept


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    kept = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in kept:
        signal.signal(number, handler)


def test_sigterm_is_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), term_interrupts():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_asks_those_who_listen_to_stop() -> None:
    interrupts = Interrupts()
    with term_interrupts(), interrupts.handled():
        interrupts.heard_by(["train"])
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL], ids=lambda handler: handler.name)
def test_sigterm_ends_what_runs_unattended_and_ignores_ctrl_c(ignored: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, ignored)
    with pytest.raises(KeyboardInterrupt), term_interrupts():
        signal.raise_signal(signal.SIGTERM)


def test_a_verb_that_is_terminated_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_code():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 130
    assert "Rerun the same command to resume" in capsys.readouterr().err


def test_what_ray_does_on_sigterm_is_undone_where_somebody_handles_it() -> None:
    def rays(*_: object) -> None:
        raise SystemExit(15)

    with term_interrupts():
        with term_kept():
            signal.signal(signal.SIGTERM, rays)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with term_kept():
        signal.signal(signal.SIGTERM, rays)
    assert signal.getsignal(signal.SIGTERM) is rays


def test_outside_the_main_thread_nothing_changes() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with term_interrupts(), term_kept():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]

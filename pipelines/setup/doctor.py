"""Independent checks for problems that would stop a run, each with a time limit."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from edt_core.errors import UserError
from edt_core.network.answers import in_background
from edt_core.printing.redaction import redacted
from pipelines.config.schema import PipelineConfig
from pipelines.setup.hardware import Hardware, this_machine

if TYPE_CHECKING:
    from concurrent.futures import Future

    from pipelines.setup.dry_run import SourceCounts

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check, and the remedy if it is not ok."""

    check: str
    status: Status
    found: str
    remedy: str = ""
    unanswered: bool = False  # the check is still running

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Setup:
    """What is checked. `images` and `machine` are determined once, for all checks that use them."""

    config: PipelineConfig
    address: str | None
    tracking_uri: str | None
    quick: bool
    images: "Future[SourceCounts]"
    machine: "Future[Hardware]"


Check = Callable[[Setup], tuple[Status, str, str]]


class Undetermined(Exception):  # noqa: N818  not an error: another check reports the cause
    """A check depends on something that could not be determined."""


def examine(setup: Setup, checks: Mapping[str, tuple[Check, float]]) -> Iterator[Finding]:
    """Run checks (name -> check, time limit in seconds) in parallel, and yield their findings in order."""
    started = time.monotonic()
    running = {name: in_background(partial(check, setup)) for name, (check, _) in checks.items()}
    for name, (_, seconds) in checks.items():
        try:
            left = max(0.0, started + seconds - time.monotonic())
            yield _finding(name, *running[name].result(timeout=left))
        except FutureTimeout:
            message = f"no answer in {seconds:.0f} s"
            yield Finding(name, "fail", message, "check the network and the disks", unanswered=True)
        except Undetermined as error:
            yield _finding(name, "warn", str(error), "fix that problem, and run edt doctor again")
        except UserError as error:
            problem, _, remedy = str(error).partition("; ")
            yield _finding(name, "fail", problem, remedy)
        except Exception as error:  # one check must not stop the others
            lines = str(error).strip().splitlines() or [""]
            yield _finding(name, "fail", f"{type(error).__name__}: {lines[0][:300]}", "")


def _finding(name: str, status: Status, summary: str, remedy: str) -> Finding:
    return Finding(name, status, redacted(summary), redacted(remedy))


def setup_of(config: PipelineConfig, address: str | None, tracking_uri: str | None, quick: bool) -> Setup:
    """A pipeline on this machine. The images and the machine are still being examined when this returns."""
    from pipelines.setup.dry_run import source_counts

    images = in_background(lambda: source_counts(config.source))
    return Setup(config, address, tracking_uri, quick, images, in_background(this_machine))

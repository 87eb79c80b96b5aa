"""What a run would stumble over, found before it: checks that stand alone, each with a time limit."""

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
    """What one check found, and what to do about it where it is not ok."""

    check: str
    status: Status
    found: str
    remedy: str = ""
    unanswered: bool = False  # the check is still at it

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Setup:
    """What is examined. `images` and `machine` are looked at once, for all checks that ask."""

    config: PipelineConfig
    address: str | None
    tracking_uri: str | None
    quick: bool
    images: "Future[SourceCounts]"
    machine: "Future[Hardware]"


Check = Callable[[Setup], tuple[Status, str, str]]


class NotKnown(Exception):  # noqa: N818  no error: what it rests on is told by another check
    """A check rests on something that could not be found out."""


def examine(setup: Setup, checks: Mapping[str, tuple[Check, float]]) -> Iterator[Finding]:
    """Run checks (name -> check, seconds it may take) side by side, and yield what each found, in their order."""
    started = time.monotonic()
    running = {name: in_background(partial(check, setup)) for name, (check, _) in checks.items()}
    for name, (_, seconds) in checks.items():
        try:
            left = max(0.0, started + seconds - time.monotonic())
            yield _finding(name, *running[name].result(timeout=left))
        except FutureTimeout:
            message = f"no answer in {seconds:.0f} s"
            yield Finding(
                name, "fail", message, "see whether the network and the disks behind it answer", unanswered=True
            )
        except NotKnown as error:
            yield _finding(name, "warn", str(error), "mend what is said of that, and ask again")
        except UserError as error:
            found, _, remedy = str(error).partition("; ")
            yield _finding(name, "fail", found, remedy)
        except Exception as error:  # a check must not take the others down
            lines = str(error).strip().splitlines() or [""]
            yield _finding(name, "fail", f"{type(error).__name__}: {lines[0][:300]}", "")


def _finding(name: str, status: Status, found: str, remedy: str) -> Finding:
    return Finding(name, status, redacted(found), redacted(remedy))


def setup_of(config: PipelineConfig, address: str | None, tracking_uri: str | None, quick: bool) -> Setup:
    """Somebody's pipeline on this machine; images and machine are being looked at when this returns."""
    from pipelines.setup.dry_run import source_counts

    images = in_background(lambda: source_counts(config.source))
    return Setup(config, address, tracking_uri, quick, images, in_background(this_machine))

"""edt doctor: problems that would stop a run, and their remedies."""

import os
import shlex
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from edt_core.printing.console import printable
from edt_core.printing.table import fitted, screen_width
from pipelines.commands.options import AsJson, Assignments, Config, ConfigStore, TrackingUri, print_json

if TYPE_CHECKING:
    from pipelines.setup.doctor import Finding

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    config: Config = "quickstart",
    assignments: Assignments = [],  # noqa: B006  typer copies it
    store: ConfigStore = None,
    tracking_uri: TrackingUri = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join  \\[default: RAY_ADDRESS, or here]")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="do not start Ray on this machine")] = False,
    as_json: AsJson = False,
) -> None:
    """Check device, Ray, store, MLflow, weights, images and disk for a configuration.

    \b
    Examples:
      edt doctor edt.yaml
      edt doctor imagenet256-edt-s --set source.path=/data/imagenet/train --address auto
      edt doctor edt.yaml --store s3://bucket/edt --json
    """
    from edt_core.environment import quiet_defaults
    from pipelines.config.schema import load_config

    loaded = load_config(config, assignments, store)
    quiet_defaults()
    from jobs.runtime.cluster_address import named_address
    from pipelines.setup.doctor import examine, setup_of
    from pipelines.setup.doctor_checks import CHECKS

    options = [part for text in assignments for part in ("--set", text)]
    options += [part for name, value in (("--store", store), ("--address", address)) if value for part in (name, value)]
    # A named cluster is reported first. A local session takes longest to start, so it stays last.
    checks = {"ray": CHECKS["ray"], **CHECKS} if named_address(address) else CHECKS
    findings, console = [], Console(highlight=False, soft_wrap=True)
    results = examine(setup_of(loaded, address, tracking_uri, quick), checks)
    with nullcontext() if as_json else console.status("checking; Ray takes longest"):
        for finding in results:
            findings.append(finding)
            if not as_json:
                _show(finding, console)
    failed = sum(finding.status == "fail" for finding in findings)
    if as_json:
        print_json([finding.as_row() for finding in findings])
    else:
        again = [*options, *(["--tracking-uri", tracking_uri] if tracking_uri else []), *(["--quick"] if quick else [])]
        retry = f"fix what failed, then run {shlex.join(['edt', 'doctor', config, *again])}"
        advice = retry if failed else shlex.join(["edt", "run", config, *options])
        console.print(f"\n{len(findings)} checks, {failed} failed. Next: {escape(printable(advice))}")
    if any(finding.unanswered for finding in findings):  # a hanging thread would keep Python from exiting
        sys.stdout.flush()
        os._exit(1)
    raise typer.Exit(1 if failed else 0)


def _show(finding: "Finding", console: Console) -> None:
    colour = _COLOURS[finding.status]
    line = fitted(f"{finding.status:<5} {finding.check:<12} {printable(finding.found)}", screen_width(), 19)
    console.print(f"[{colour}]{line[:5]}[/]{escape(line[5:])}")
    if finding.remedy:
        remedy = fitted(f"{'':<18} -> {printable(finding.remedy)}", screen_width(), 22)
        console.print(escape(remedy), style=colour)

"""The command `edt distill`: a student that samples in few steps, of a registered model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edt_core.printing.console import say
from pipelines.commands.options import (
    DEFAULT_STORE,
    AsJson,
    Assignments,
    StoreOption,
    TrackingUri,
    open_catalog,
    print_json,
)
from pipelines.commands.workflow import Address, NoOverlap, execute, print_plan

if TYPE_CHECKING:
    from pipelines.retrain.student import Distillation


def distill(
    teacher: Annotated[str, typer.Argument(help="registered model to learn from: NAME@ALIAS, NAME/NUMBER or NAME")],
    steps: Annotated[int, typer.Option(min=2, help="sampling steps of the student")],
    name: Annotated[
        str | None, typer.Option(help="registry name of the student  \\[default: like edt-s-2-256-4-steps]")
    ] = None,
    assignments: Assignments = [],  # noqa: B006  typer copies it
    teacher_steps: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="steps of the teacher in the training, a multiple of --steps  \\[default: those of its protocol, at "
            "most 8 in each step of the student]",
        ),
    ] = None,
    train_steps: Annotated[
        int | None, typer.Option(min=1, help="steps of the training  \\[default: half of the teacher's]")
    ] = None,
    show_plan: Annotated[bool, typer.Option("--plan", help="show which steps would run, and start nothing")] = False,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
    address: Address = None,
    no_overlap: NoOverlap = False,
    as_json: AsJson = False,
) -> None:
    """Train a student of a registered model, which samples in few steps.

    \b
    Examples:
      edt distill edt-tiny-digits-32@champion --steps 4 --plan
      edt distill edt-s-2-256@champion --steps 8 --set promote.teacher_margin=0.2
    """
    from jobs.runtime.cluster_address import check_named
    from pipelines.plan import plan
    from pipelines.retrain.student import Request, prepare

    check_named(address)
    catalog = open_catalog(store, tracking_uri)
    request = Request(teacher, store, steps, name, teacher_steps, train_steps, tuple(assignments))
    distillation = prepare(catalog, request)
    if show_plan:
        rows = [step.as_row() for step in plan(distillation.config, catalog)]
        if as_json:
            print_json({**_facts(distillation), "steps": rows})
            return
        for note in _notes(distillation):
            say(note)
        print_plan(rows)
        return
    execute(
        distillation.config,
        "distill",
        address,
        no_overlap,
        as_json,
        notes=list(_notes(distillation)),
        tracking_uri=catalog.tracking_uri,
    )


def _facts(distillation: "Distillation") -> dict[str, Any]:
    train, version = distillation.config.train_of(distillation.name), distillation.teacher
    settings = train.distill
    assert settings is not None, "checked by `prepare`"
    chain = settings.teacher
    return {
        "model": distillation.name,
        "teacher": f"{version.name}/{version.version}",
        "student_steps": settings.steps,
        "teacher_steps": chain.num_sampling_steps,
        "sampler": chain.sampler,
        "cfg_scale": chain.cfg_scale,
        "max_steps": train.max_steps,
    }


def _notes(distillation: "Distillation") -> Iterator[str]:
    facts = _facts(distillation)
    guidance = f", guided by {facts['cfg_scale']:g}" if facts["cfg_scale"] != 1.0 else ""
    yield f"teacher   {facts['teacher']}, {facts['teacher_steps']} steps of {facts['sampler']}{guidance}"
    training = f"trained for {facts['max_steps']} steps"
    yield f"student   {facts['model']}, {facts['student_steps']} steps, unguided, {training}"

"""edt init: write a first configuration from questions or flags."""

import os
import shlex
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from edt_core.errors import UserError
from edt_core.files.place_names import typed_path
from edt_core.printing.console import printable, say

if TYPE_CHECKING:
    from pipelines.setup.init import Answers, Images

Answer = TypeVar("Answer")


def init(
    images: Annotated[str | None, typer.Option(help="folder <class>/<image>, archives, Parquet, or a URI")] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="PIXELS", help="side of the images that the model generates")
    ] = None,
    hardware: Annotated[
        str | None, typer.Option(metavar="cpu|gpu|gpu-8", help="hardware that the pipeline will run on")
    ] = None,
    model: Annotated[str | None, typer.Option(help="model, such as EDT-S/2; `edt cost` lists them")] = None,
    autoencoder: Annotated[
        str | None, typer.Option(help="hub id, folder or models:/NAME@ALIAS of a published one, or 'fit' to train one")
    ] = None,
    inception_weights: Annotated[
        str | None, typer.Option(help="file with Inception's weights, for FID  \\[default: use a fitted classifier]")
    ] = None,
    allow_empty_classes: Annotated[
        bool, typer.Option("--allow-empty-classes", help="count class folders without images as classes")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="name of the pipeline, used in its model's name  \\[default: that of the folder]")
    ] = None,
    out: Annotated[Path, typer.Option(help="file to write")] = Path("edt.yaml"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="ask nothing and use the suggestions")] = False,
    force: Annotated[bool, typer.Option("--force", help="overwrite an existing file")] = False,
) -> None:
    """Write a commented configuration for your images. It asks what it needs.

    \b
    Examples:
      edt init
      edt init --images /data/flowers --yes
      edt init --images s3://bucket/imagenet/train --image-size 256 --hardware gpu-8 --out imagenet.yaml --yes
    """
    from pipelines.setup.hardware import this_machine
    from pipelines.setup.init import config_text, look_at, notes, summary

    if os.path.lexists(out) and not force:  # a broken link also counts as existing
        raise UserError(f"{out} already exists; set another --out, or overwrite it with --force")
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out} must end with .yaml or .yml; use {out}.yaml")
    prompt = _Prompt(not yes and sys.stdin.isatty(), yes)
    look = partial(look_at, allow_empty_classes=allow_empty_classes)
    answers = _answers(prompt, look, images, image_size, hardware, model, autoencoder, inception_weights, name)
    machine = this_machine()
    text = config_text(answers, machine, out.name)
    _write(out, text)
    for key, value in summary(answers).items():
        say(f"{key:<12} {value}")
    for note in notes(answers, machine):
        say(f"note: {note}", err=True)
    say(f"\nwrote {out}. Next:")
    file = shlex.quote(str(out))
    for command, why in (
        (f"edt doctor {file}", "does this machine have what the pipeline needs"),
        (f"edt run {file} --dry-run", "what training needs: memory, steps, time"),
        (f"edt plan {file}", "which steps would run"),
        (f"edt run {file}", "run everything; after Ctrl-C, rerun it to resume"),
    ):
        say(f"  {command:<32} # {why}")


def _answers(
    prompt: "_Prompt",
    look_at: Callable[[str], "Images"],
    images: str | None,
    image_size: str | None,
    hardware: str | None,
    model: str | None,
    autoencoder: str | None,
    inception_weights: str | None,
    name: str | None,
) -> "Answers":
    """Every answer in turn, from its flag, a question or the suggestion. Each is checked before the next question."""
    from pipelines.setup import init as first
    from pipelines.setup.hardware import this_machine

    listing = prompt.of("--images", "Where are the images (folder, archive or URI)?", images, None, look_at, str)
    machine = this_machine()
    here = first.hardware_name(len(machine.gpus))
    what = f"Which hardware (cpu, gpu, gpu-N; here: {machine})?"
    gpus = prompt.of("--hardware", what, hardware, here, first.parse_hardware)
    suggestion = str(first.suggested_size(listing, gpus))
    size = prompt.of("--image-size", "Which image size in pixels?", image_size, suggestion, first.check_size)
    if prompt.interactive and model is None:
        say(f"The models are: {first.models_text()}")
    network = prompt.of("--model", "Which model?", model, first.suggested_model(listing, gpus), first.check_model)
    suggestion = first.suggested_autoencoder(size, gpus)
    how = "Which autoencoder (hub id, folder, or 'fit' for one of your images)?"
    fits = partial(first.check_autoencoder, image_size=size, model=network)
    vae = prompt.of("--autoencoder", how, autoencoder, suggestion, fits)
    pipeline_name = prompt.of("--name", "Which name?", name, first.suggested_name(listing.path), first.check_name)
    if inception_weights is not None and not typed_path(inception_weights).is_file():
        raise UserError(
            f"--inception-weights {inception_weights} is no file; correct the path, or omit the option and FID"
        )
    weights = None if inception_weights is None else str(typed_path(inception_weights).absolute())
    return first.Answers(listing, pipeline_name, size, gpus, network, vae, weights)


class _Prompt:
    """Gets answers: from a flag, on a terminal from a question, otherwise from the suggestion if that is allowed."""

    def __init__(self, interactive: bool, take_suggested: bool) -> None:
        self.interactive, self.take_suggested = interactive, take_suggested

    def of(
        self,
        flag: str,
        question: str,
        value: str | None,
        suggested: str | None,
        read: Callable[[str], Answer],
        describe: Callable[[Answer], str] | None = None,
    ) -> Answer:
        """One answer, parsed. Raises UserError for an invalid flag, or for a missing one without a terminal."""
        if value is not None or not self.interactive:
            text = value if value is not None else self._default(flag, suggested)
            return read(text)

        def checked(text: str) -> Answer:
            try:
                return read(text)
            except UserError as error:
                raise typer.BadParameter(printable(str(error))) from error

        answer: Answer = typer.prompt(question, default=suggested, value_proc=checked)
        if describe is not None:
            say(f"  {describe(answer)}")
        return answer

    def _default(self, flag: str, suggested: str | None) -> str:
        if suggested is not None and self.take_suggested:
            return suggested
        remedy = "" if suggested is None else f", or use --yes for the suggestion ({suggested})"
        raise UserError(f"{flag} is missing, and there is no terminal to ask for it; set {flag}{remedy}")


def _write(out: Path, text: str) -> None:
    """Write the file if it is a valid configuration. Raises UserError, and leaves no file, if it is not."""
    from pipelines.config.schema import load_config

    staged = out.with_name(f".{out.stem}.{uuid.uuid4().hex}.yaml")  # a new name, so that no file is overwritten
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(text, encoding="utf-8")
        load_config(str(staged))
        staged.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; set another --out") from error
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)

"""edt init: a first configuration, by questions or by flags."""

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
    image_size: Annotated[str | None, typer.Option(metavar="PIXELS", help="side of the images the model draws")] = None,
    hardware: Annotated[str | None, typer.Option(metavar="cpu|gpu|gpu-8", help="what it will run on")] = None,
    model: Annotated[str | None, typer.Option(help="as EDT-S/2; `edt cost` lists them")] = None,
    autoencoder: Annotated[
        str | None, typer.Option(help="hub id, folder or models:/NAME@ALIAS of a published one, or 'fit'")
    ] = None,
    inception_weights: Annotated[
        str | None, typer.Option(help="file of Inception's weights, for FID  \\[default: a fitted classifier instead]")
    ] = None,
    allow_empty_classes: Annotated[
        bool, typer.Option("--allow-empty-classes", help="take class folders without images for classes")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="of the pipeline and in its model's  \\[default: the folder's]")
    ] = None,
    out: Annotated[Path, typer.Option(help="the file to write")] = Path("edt.yaml"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="ask nothing: take what is suggested")] = False,
    force: Annotated[bool, typer.Option("--force", help="write over a file that is there")] = False,
) -> None:
    """Write a commented configuration for your images: asks where they are, and so on.

    \b
    Examples:
      edt init
      edt init --images /data/flowers --yes
      edt init --images s3://bucket/imagenet/train --image-size 256 --hardware gpu-8 --out imagenet.yaml --yes
    """
    from pipelines.setup.hardware import this_machine
    from pipelines.setup.init import config_text, look_at, notes, summary

    if os.path.lexists(out) and not force:  # a link to nothing is somebody's, too
        raise UserError(f"{out} is there already; give another --out, or --force to write over it")
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out} is no .yaml file, and configurations are known by that; give one, as {out}.yaml")
    asked = _Asked(not yes and sys.stdin.isatty(), yes)
    look = partial(look_at, allow_empty_classes=allow_empty_classes)
    answers = _answers(asked, look, images, image_size, hardware, model, autoencoder, inception_weights, name)
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
        (f"edt doctor {file}", "does this machine have what it needs"),
        (f"edt run {file} --dry-run", "what it takes: memory, steps"),
        (f"edt plan {file}", "which steps there are"),
        (f"edt run {file}", "all of it; Ctrl-C and run again as you like"),
    ):
        say(f"  {command:<32} # {why}")


def _answers(
    asked: "_Asked",
    look_at: Callable[[str], "Images"],
    images: str | None,
    image_size: str | None,
    hardware: str | None,
    model: str | None,
    autoencoder: str | None,
    inception_weights: str | None,
    name: str | None,
) -> "Answers":
    """Every answer in turn: of its flag, or asked, or as suggested. Each is looked at before the next question."""
    from pipelines.setup import init as first
    from pipelines.setup.hardware import this_machine

    found = asked.of("--images", "Where are the images (folder, archive or URI)?", images, None, look_at, str)
    machine = this_machine()
    here = first.hardware_name(len(machine.gpus))
    what = f"Which hardware (cpu, gpu, gpu-N; here: {machine})?"
    gpus = asked.of("--hardware", what, hardware, here, first.parse_hardware)
    usual = str(first.suggested_size(found, gpus))
    size = asked.of("--image-size", "Which image size in pixels?", image_size, usual, first.check_size)
    network = asked.of("--model", "Which model?", model, first.suggested_model(found, gpus), first.check_model)
    usual = first.suggested_autoencoder(size, gpus)
    how = "Which autoencoder (hub id, folder, or 'fit' for one of your images)?"
    fits = partial(first.check_autoencoder, image_size=size, model=network)
    vae = asked.of("--autoencoder", how, autoencoder, usual, fits)
    named = asked.of("--name", "Which name?", name, first.suggested_name(found.path), first.check_name)
    if inception_weights is not None and not typed_path(inception_weights).is_file():
        raise UserError(
            f"--inception-weights {inception_weights} is no file; give it, or leave it out and do without FID"
        )
    weights = None if inception_weights is None else str(typed_path(inception_weights).absolute())
    return first.Answers(found, named, size, gpus, network, vae, weights)


class _Asked:
    """How an answer comes about: by its flag, on a terminal by a question, and otherwise as suggested or not at all."""

    def __init__(self, interactive: bool, take_suggested: bool) -> None:
        self.interactive, self.take_suggested = interactive, take_suggested

    def of(
        self,
        flag: str,
        question: str,
        given: str | None,
        suggested: str | None,
        read: Callable[[str], Answer],
        tell: Callable[[Answer], str] | None = None,
    ) -> Answer:
        """One answer, read. Raises UserError for a bad flag, and for a missing one where nobody can be asked."""
        if given is not None or not self.interactive:
            text = given if given is not None else self._unasked(flag, suggested)
            return read(text)

        def checked(text: str) -> Answer:
            try:
                return read(text)
            except UserError as error:
                raise typer.BadParameter(printable(str(error))) from error

        answer: Answer = typer.prompt(question, default=suggested, value_proc=checked)
        if tell is not None:
            say(f"  {tell(answer)}")
        return answer

    def _unasked(self, flag: str, suggested: str | None) -> str:
        if suggested is not None and self.take_suggested:
            return suggested
        remedy = "" if suggested is None else f", or --yes for what is suggested ({suggested})"
        raise UserError(f"{flag} is missing, and this is no terminal to ask on; give {flag}{remedy}")


def _write(out: Path, text: str) -> None:
    """Write the file and read it as a configuration. Raises UserError, without a file, where it is none."""
    from pipelines.config.schema import load_config

    staged = out.with_name(f".{out.stem}.{uuid.uuid4().hex}.yaml")  # no file of anybody's
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(text, encoding="utf-8")
        load_config(str(staged))
        staged.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; give another --out") from error
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)

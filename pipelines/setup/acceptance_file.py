"""The rates that `edt bench gpu --out FILE` measured on a card, read from that file.

A row with images per second becomes the operations per second that were reached: images/s x counted operations of an
image. Counting computes nothing.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch.utils.flop_counter import FlopCounterMode

from edt_core.acceptance.command import FORMAT
from edt_core.acceptance.rows import CORRECTNESS
from edt_core.acceptance.sampling import Autoencoder
from edt_core.errors import UserError
from edt_core.files.small_files import MAX_CONFIG_BYTES, UnusableFileError, parse_json, read_bounded
from edt_core.models import ModelConfig, macs_of, model_config, training_flops
from edt_core.printing.console import on_one_line

Work = Literal["train", "sample", "encode", "decode"]
Place = str | PathLike[str]

FACTOR, LATENT_CHANNELS = 8, 4  # of SD-VAE, whose shape the measured autoencoder has
FULL_SIZE, _TINY_SIZE, _TINY_CLASSES = 256, 32, 10  # of the models that an acceptance trains, see its `Setting.model`
_TINY = "-Tiny/"
_AGAIN = "give a file that `edt bench gpu --out FILE` wrote, or run that command again"
_IMAGES, _TERAFLOPS = "images/s", "TFLOP/s"
_LEAST, _MOST = 1e-6, 1e9  # a rate, in either unit
_MAX_TEXT = 300
_NUMBER = r"[1-9]\d{0,6}"
# Names of rows with a rate.
_ROWS: tuple[tuple[Work, str], ...] = (
    ("train", rf"(?P<model>\S+/\d+) at (?P<batch>{_NUMBER}), (?P<precision>\w+) (?P<kind>eager|compiled)"),
    ("sample", r"sampling, (?P<model>\S+/\d+) (?P<precision>\w+)(?P<kind> compiled)?, (?P<amm>no AMM|AMM)"),
    ("encode", r"encoding at (?P<size>[1-9]\d{0,3}) px, (?P<precision>\w+), channels first"),
    ("decode", r"decoding at (?P<size>[1-9]\d{0,3}) px, (?P<precision>\w+), channels first"),
    ("decode", rf"decoding (?P<batch>{_NUMBER}) images at (?P<size>[1-9]\d{{0,3}}) px at once, (?P<precision>\w+)"),
)
_CHAIN = re.compile(rf"({_NUMBER}) steps, guided")
_PRODUCT = re.compile(r"matrix product, (\w+)")
_FEEDING = re.compile(rf"feeding, batch ({_NUMBER}), one rank of ({_NUMBER})")


class _Row(BaseModel):
    """The fields of a row that are read."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    section: str
    name: str = Field(max_length=_MAX_TEXT)
    value: float | None
    unit: str
    passed: bool | None
    note: str


class _File(BaseModel):
    """The fields of the file that are read."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    card: str = Field(max_length=_MAX_TEXT)
    memory_gib: float | None  # null on a CPU
    torch: str = Field(max_length=_MAX_TEXT)
    code: str = Field(max_length=_MAX_TEXT)
    started: str = Field(max_length=_MAX_TEXT)
    rows: list[_Row]


@dataclass(frozen=True)
class Job:
    """Work of one kind, with all that decides which rate it reaches.

    flops: operations of one image; of a chain those of one pass. model: "" for the autoencoder. batch: images of a
    device.
    """

    work: Work
    precision: str
    flops: int
    model: str = ""
    batch: int = 1
    compiled: bool = False
    amm: bool = False


@dataclass(frozen=True)
class Rate:
    """The operations per second that a row measured for a job. `row` is its name."""

    job: Job
    flops_per_s: float
    row: str


@dataclass(frozen=True)
class Measurements:
    """The content of the file.

    products: operations per second of a large matrix product, by precision.
    feeding: images per second that one rank's host prepares, by (global batch, ranks), for full models.
    is_checked: whether rows of correctness are in the file, and passed.
    """

    card: str
    on_gpu: bool
    started: str
    code: str
    torch: str
    rates: tuple[Rate, ...]
    products: Mapping[str, float]
    feeding: Mapping[tuple[int, int], float]
    is_checked: bool


def read_measurements(path: Place) -> Measurements:
    """The rates of a file. Raises UserError if it is another file, or its run failed a check of correctness."""
    try:
        values = parse_json(read_bounded(path, MAX_CONFIG_BYTES), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {_AGAIN}") from error
    except UnusableFileError as error:
        raise UserError(f"{error}, or {_AGAIN}") from error
    number = values.get("format") if isinstance(values, dict) else None
    if number != FORMAT or isinstance(number, bool):
        what = "no format number" if number is None else f"format {str(number)[:20]!r}"
        raise UserError(f"{path} has {what}, but a file of this version's `edt bench gpu` has {FORMAT}; {_AGAIN}")
    try:
        file = _File.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = on_one_line(".".join(map(str, first["loc"])))
        raise UserError(f"{path} is not a file of `edt bench gpu`: {place}: {first['msg']}; {_AGAIN}") from error
    _check_correct(path, file.rows)
    rates = tuple(_rates(path, file.rows))
    feeding = {(int(batch), int(ranks)): x for (batch, ranks), x in _figures(path, file.rows, _FEEDING, _IMAGES)}
    return Measurements(
        card=on_one_line(file.card),
        on_gpu=file.memory_gib is not None,
        started=on_one_line(file.started),
        code=on_one_line(file.code),
        torch=on_one_line(file.torch),
        rates=rates,
        products={name: x * 1e12 for (name,), x in _figures(path, file.rows, _PRODUCT, _TERAFLOPS)},
        feeding={} if any(_TINY in rate.job.model for rate in rates) else feeding,
        is_checked=any(row.section == CORRECTNESS and row.passed for row in file.rows),
    )


def _check_correct(path: Place, rows: Sequence[_Row]) -> None:
    failed = [row for row in rows if row.section == CORRECTNESS and row.passed is False]
    if failed:
        reason = on_one_line(failed[0].note)[:_MAX_TEXT] or f"{failed[0].value}"
        raise UserError(
            f"{path}: a check of correctness failed, {on_one_line(failed[0].name)} ({reason}), so its rates may be "
            "those of a wrong computation; do not train on that machine, report the row, and give the file of a run "
            "that passes"
        )


def _figures(
    path: Place, rows: Sequence[_Row], pattern: re.Pattern[str], unit: str
) -> Iterator[tuple[tuple[str, ...], float]]:
    """The groups of the pattern, and the rate, of each row that was measured."""
    for row in rows:
        if row.unit == unit and row.value is not None and (found := pattern.fullmatch(row.name)):
            yield found.groups(), _checked(path, row, row.value)


def _checked(path: Place, row: _Row, value: float) -> float:
    if not _LEAST <= value <= _MOST:
        raise _unusable(path, row, f"{value:g} {row.unit} is no rate")
    return value


def _unusable(path: Place, row: _Row, problem: str) -> UserError:
    return UserError(f"{path}: the row {on_one_line(row.name)!r} cannot be used: {problem}; {_AGAIN}")


def _rates(path: Place, rows: Sequence[_Row]) -> Iterator[Rate]:
    for row in rows:
        if row.unit != _IMAGES or row.value is None:
            continue
        for work, pattern in _ROWS:
            if found := re.fullmatch(pattern, row.name):
                images_per_s = _checked(path, row, row.value)
                try:
                    yield _rate(work, found.groupdict(), images_per_s, row)
                except ValueError as error:
                    raise _unusable(path, row, str(error)) from error
                break


def _rate(work: Work, fields: Mapping[str, str | None], images_per_s: float, row: _Row) -> Rate:
    precision, kind, model = fields["precision"] or "", fields.get("kind") or "", fields.get("model") or ""
    passes = 1
    if work == "train":
        config = _measured_model(model)
        flops = training_flops(config, masked=config.is_masked)
    elif work == "sample":
        flops = forward_flops(_measured_model(model))
        if (steps := _CHAIN.match(row.note)) is None:
            raise ValueError("its note does not state the steps of a guided chain")
        passes = 2 * int(steps[1])  # with a label and without
    else:
        flops = autoencoder_flops(work, int(fields["size"] or 0))
    batch = int(fields.get("batch") or 1)
    job = Job(work, precision, flops, model, batch, "compiled" in kind, fields.get("amm") == "AMM")
    return Rate(job, images_per_s * flops * passes, on_one_line(row.name))


def _measured_model(name: str) -> ModelConfig:
    return model_config(name, _TINY_SIZE, _TINY_CLASSES) if _TINY in name else model_config(name, FULL_SIZE)


def forward_flops(config: ModelConfig) -> int:
    """Operations of one forward pass for one image."""
    return 2 * macs_of(config)


@lru_cache(maxsize=16)
def autoencoder_flops(work: Work, image_size: int) -> int:
    """Operations to encode or decode one image with a network of SD-VAE's shape.

    Raises ValueError for a side that is not a multiple of 8.
    """
    if image_size < FACTOR or image_size % FACTOR:
        raise ValueError(f"{image_size} px are not a multiple of {FACTOR}")
    side = image_size // FACTOR
    with torch.device("meta"):
        network = Autoencoder()
        part = network.encoder if work == "encode" else network.decoder
        shape = (3, image_size, image_size) if work == "encode" else (LATENT_CHANNELS, side, side)
        inputs = torch.empty(1, *shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        part(inputs)
    return counter.get_total_flops()

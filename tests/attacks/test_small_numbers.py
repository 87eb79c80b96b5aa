"""Small numbers in every whole-number field of the configuration: a pipeline ends, or is refused before its first step.

The fields come from the schema, so a new one cannot be forgotten. A pipeline costs seconds; so each takes as many of
the numbers as are allowed together, no more than one a field.
"""

import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from edt_core.config import Section, SourceConfig
from edt_core.errors import UserError
from edt_core.one_cycle import one_cycle
from jobs.stages.preprocess import image_source
from pipelines.config.schema import PipelineConfig, load_config
from pipelines.config.size_check import check_pipeline_sizes
from tests.support.small import SMALL, edt, pipeline

NUMBERS = (1, 2, 3, 5, 9, 10, 11)
Setting = tuple[str, int]
BASE = (
    "train.global_batch_size=8",
    "train.max_steps=4",
    "autoencoder.steps=4",
    "classifier.steps=4",
    "sample.num_samples=12",
    "sample.unit_size=6",
    "sample.num_sampling_steps=2",
    "sample.guidance_channels=null",
    "train.min_snr_gamma=null",
    "evaluate.metrics=[fid]",  # of two samples there is no precision
    "evaluate.allow_rank_deficient=true",
    "train.num_workers=1",
    "encode.num_workers=1",
)
# The largest number to try, where more only costs time.
LARGEST = {"sample.repeats": 3, "along.repeats": 3, "autoencoder.layers_per_block": 3}


def whole_number_fields(schema: type[Section] = PipelineConfig, prefix: str = "") -> Iterator[tuple[str, int | None]]:
    """Dotted name of every field that takes a whole number, or several, and the least that its schema allows."""
    for name, field in schema.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from whole_number_fields(kind, f"{prefix}{name}.")
        elif _takes_int(kind):
            least = [limit.ge for limit in field.metadata if hasattr(limit, "ge")]
            yield f"{prefix}{name}", int(least[0]) if least else None


def _takes_int(kind: Any) -> bool:
    return kind is int or any(_takes_int(part) for part in typing.get_args(kind))


def settings(number_of: Mapping[str, int]) -> list[str]:
    """Assignments for fields and their numbers; a field of several numbers has one."""
    return [f"{name}={_written(name, number)}" for name, number in number_of.items()]


def _written(name: str, number: int) -> str:
    return f"[{number}]" if name in ("sample.amm_blocks", "train.amm_blocks") else str(number)


@lru_cache
def num_images(source: SourceConfig) -> int:
    """Images of a source. Raises UserError for too few, as a run does before its first step."""
    return image_source(source).images or 0


def refusal(base: Sequence[str], chosen: Mapping[str, int]) -> str | None:
    """What keeps a run from starting, or None."""
    try:
        config = load_config("quickstart", [*SMALL, *base, *settings(chosen)])
        check_pipeline_sizes(config, num_images(config.source))
    except UserError as error:
        return str(error)
    return None


def all_settings(numbers: Sequence[int] = NUMBERS) -> list[Setting]:
    """Each field with each number, and with its least. Neighbours begin with different numbers."""
    pairs: list[Setting] = []
    for turn, (name, least) in enumerate(whole_number_fields()):
        tried = [number for number in numbers if number <= LARGEST.get(name, number)]
        start = turn % len(tried)
        pairs += [(name, number) for number in (*tried[start:], *tried[:start])]
        if least is not None and least not in tried:
            pairs.append((name, least))
    return pairs


def packed(base: Sequence[str], pairs: Sequence[Setting]) -> Iterator[dict[str, int]]:
    """The pairs in as few configurations as may be; those that are refused in each of them are left out."""
    left = list(pairs)
    while left:
        chosen: dict[str, int] = {}
        for _ in range(2):  # one number may need another, which comes later
            for name, number in left:
                if name not in chosen and refusal(base, {**chosen, name: number}) is None:
                    chosen[name] = number
        if not chosen:
            return
        left = [pair for pair in left if chosen.get(pair[0]) != pair[1]]
        yield chosen


def ends_well(store: Path, base: Sequence[str], chosen: Mapping[str, int]) -> None:
    """Run a pipeline with the numbers, and check that it made a model of finite metrics."""
    outcome = pipeline(store, *base, *settings(chosen))
    assert outcome.failures == {}, chosen
    assert all(math.isfinite(value) for _, after in outcome.metrics.values() for value in after.values()), chosen
    assert outcome.decisions


@pytest.fixture
def base(digits_folder: Path) -> tuple[str, ...]:
    return (*BASE, "source.kind=image_folder", "source.limit=null", f"source.path={digits_folder}")


@pytest.mark.usefixtures("training_here")
def test_the_least_of_every_number_at_once(tmp_path: Path, base: tuple[str, ...]) -> None:
    chosen = next(packed(base, sorted(all_settings((1, 2)), key=lambda pair: pair[1])))
    assert len(chosen) > 35
    ends_well(tmp_path / "store", base, chosen)


STREAMED_DIT = (
    "train.model=DiT-Tiny/2",
    "train.masked_loss=false",
    "train.reader=webdataset",
    "encode.write_webdataset=true",
)


@pytest.mark.slow
@pytest.mark.parametrize("others", [(), STREAMED_DIT])
@pytest.mark.usefixtures("training_here")
def test_every_small_number_that_is_allowed(tmp_path: Path, base: tuple[str, ...], others: Sequence[str]) -> None:
    """DiT takes images of 8 pixels; the streaming reader has numbers of its own."""
    pairs, tried = all_settings(), 0
    for number, chosen in enumerate(packed((*base, *others), pairs)):
        ends_well(tmp_path / str(number), (*base, *others), chosen)
        tried += len(chosen)
    assert tried > 0.75 * len(pairs)


def test_a_refusal_is_told_with_its_field_and_its_value(base: tuple[str, ...]) -> None:
    """Before anything is made. The schema says which numbers those are; most of the fields begin at 1."""
    messages = {pair: refusal(base, dict([pair])) for pair in all_settings((1, 2, 10))}
    refused = {pair: message for pair, message in messages.items() if message is not None}
    assert 0 < len(refused) < len(messages) / 3
    for (name, number), message in refused.items():
        if name != "source.limit":  # one image is of one class, and the message is about classes
            assert any(word in message for word in name.rpartition(".")[2].split("_")), message
            assert str(number) in message, message


def test_a_refusal_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    done = edt("run", "--store", str(tmp_path / "store"), "--set", "train.num_timesteps=20")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "train.num_timesteps" in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_fit_of_any_number_of_steps_has_a_rate_that_fits() -> None:
    for steps in range(1, 31):
        rates = rates_of(steps)
        assert all(0 < rate <= 0.5 for rate in rates), steps
        assert max(rates) > 0.2, steps


def rates_of(steps: int) -> list[float]:
    """The learning rate of each step of a fit."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([weight], lr=0.5)
    schedule = one_cycle(optimizer, 0.5, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        weight.grad = torch.ones(1)
        optimizer.step()
        schedule.step()
    return rates

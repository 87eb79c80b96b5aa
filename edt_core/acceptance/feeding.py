"""Section E: whether a host prepares batches and random numbers as fast as its GPUs train on them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from time import perf_counter
from typing import cast

from edt_core.acceptance.options import training
from edt_core.acceptance.rows import Measure, Task, at_least, figure
from edt_core.acceptance.subjects import Setting, latent_dataset, new_state, trainer_of
from edt_core.models import ModelConfig
from edt_core.training.loop import prepared_steps
from edt_core.training.ranks import Ranks
from edt_core.training.trainer import Trainer

_FASTEST = "EDT-S/2"  # the model that trains the most images per second
_SECONDS = 3.0


def tasks(setting: Setting) -> Iterator[Task]:
    """Global batches of 256 and 2,048, on one rank and as one rank of eight."""
    config = setting.model(_FASTEST)
    for batch in (256, 2048):
        for world_size in (1, 8):
            yield Task(
                f"feeding, batch {batch}, one rank of {world_size}",
                partial(feeding_rows, config, batch, world_size, setting),
                setting.seconds(6),
            )


def feeding_rows(config: ModelConfig, batch: int, world_size: int, setting: Setting) -> Iterator[Measure]:
    """Images per second that the thread of one rank prepares: latents, draws, masks, page-locked memory."""
    batch = setting.count(batch, 2 * world_size)
    options = training(global_batch_size=batch, num_workers=world_size, max_steps=1_000_000)
    dataset = latent_dataset(setting.work, config, setting.count(2048, 64))
    state = new_state(options, config, setting.device)
    trainer = trainer_of(options, dataset, state, setting.work, Ranks(0, world_size, setting.device))
    rate = prepared_rate(trainer, _SECONDS if setting.is_full else 0.2)
    name = f"feeding, batch {batch}, one rank of {world_size}"
    needed = setting.rates.get(f"{_FASTEST} compiled")
    if needed is None:
        yield figure(name, rate, "images/s", "section C, whose rate it needs, was not measured")
        return
    yield at_least(name, rate, round(needed, 1), "images/s", f"the rate of {_FASTEST}, compiled, in section C")


def prepared_rate(trainer: Trainer, seconds: float) -> float:
    """This rank's images per second from the generator that the training loop's thread runs."""
    share = trainer.share.stop - trainer.share.start
    steps = cast("Generator[object, None, None]", prepared_steps(trainer))
    with closing(steps) as prepared:
        next(prepared)  # opens files and allocates buffers
        started, count = perf_counter(), 0
        while count == 0 or perf_counter() - started < seconds:
            next(prepared)
            count += 1
        return count * share / (perf_counter() - started)

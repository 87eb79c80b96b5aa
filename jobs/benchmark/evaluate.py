"""Speed of sampling and evaluation: the sampler beside bare model calls, a whole evaluation beside a plain one.

The two sides of a ratio are measured in the same run, in turns, because the speed of a shared machine drifts. All
weights are random. Legend: N images, C latent channels, h side of the latents, S image side, T steps of a chain.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from edt_core.acceptance.authors import plain_model
from edt_core.autoencoders.autoencoder import decode_to_pixels
from edt_core.diffusion import linear_schedule, sampling_schedule
from edt_core.models import DiffusionTransformer
from edt_core.precision import use_precision
from edt_core.sampling.sampler import LatentSampler
from edt_core.store.artifact import ArtifactWriter
from edt_core.store.folder import Folder
from jobs.benchmark.networks import (
    FULL_STEPS,
    NUM_TIMESTEPS,
    EvalSubject,
    Networks,
    as_inputs,
    chain_config,
    made_networks,
)
from jobs.benchmark.plain import PlainChain, PlainEvaluation, Stages, of_all, plain_precision
from jobs.benchmark.table import Row, timed
from jobs.benchmark.train import in_turns
from jobs.stages.sample import Sampler, unit_of, units_per_repeat

_STEPS_ALONE = 3  # of the chains that are compared with bare calls
_PRECISIONS = ("fp32", "bf16")
_WHOLE_TARGETS = {("cpu", "fp32"): "at least 1.5", ("cpu", "bf16"): "at least 1.5", ("cuda", "bf16"): "at least 4"}


def bench_eval(work: Path, subject: EvalSubject, turns: int) -> Iterator[list[Row]]:
    """The rows of each measurement once it is done; chains are drawn `turns` times, whole sets a fifth as often."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks = made_networks(subject)
    rows, step_s = _sampling(subject, networks.model, device, turns)
    yield rows
    yield _whole(work, subject, networks, device, max(1, turns // 5), step_s)


# --- the sampler beside bare calls of its model


def _sampling(
    subject: EvalSubject, network: DiffusionTransformer, device: torch.device, turns: int
) -> tuple[list[Row], dict[str, float]]:
    """Rows of chains in both precisions, of a plain chain, and of bare model calls, at once or half by half.

    Also returns the seconds per step and image of each chain.
    """
    use_precision("fp32")
    model, count = network.to(device), subject.batch_size
    indices = list(range(count))
    labels = [index % model.config.num_classes for index in indices]
    samplers = {name: LatentSampler(model, chain_config(name, _STEPS_ALONE), NUM_TIMESTEPS) for name in _PRECISIONS}
    moved = _relative_rms(samplers["bf16"](labels, 0, indices), samplers["fp32"](labels, 0, indices))
    schedule = sampling_schedule(linear_schedule(NUM_TIMESTEPS), _STEPS_ALONE)
    timesteps = schedule.timestep_map.tolist()
    pair: dict[str, Callable[[], object]] = {
        "fp32": partial(samplers["fp32"], labels, 0, indices),
        "bare": partial(bare_calls, model, timesteps, labels, at_once=True),
    }
    runs: dict[str, Callable[[], object]] = {
        **pair,
        "bf16": partial(samplers["bf16"], labels, 0, indices),
        "plain": _plain_run(PlainChain(plain_model(model).eval(), schedule), labels, device),
        "apart": partial(bare_calls, model, timesteps, labels, at_once=False),
    }
    # Runs that differ by a few percent take turns only with each other: the run before, the plain chain most of all,
    # affects the time of the next one.
    close, seconds = in_turns(pair, turns, device), in_turns(runs, max(1, turns // 2), device)
    step_s = {name: duration / (count * _STEPS_ALONE) for name, duration in seconds.items()}
    return _sampling_rows(subject, close, seconds, moved, plain_precision(device)), step_s


def _sampling_rows(
    subject: EvalSubject, close: Mapping[str, float], seconds: Mapping[str, float], moved: float, plain_precision: str
) -> list[Row]:
    count = subject.batch_size
    rate = {name: f"{count / duration:.3f}" for name, duration in seconds.items()}
    what = f"{subject.model} at {subject.image_size}, {count} images, guided, {_STEPS_ALONE} steps"
    rows = [
        Row(
            f"sampling, fp32, {what}",
            f"{count / close['fp32']:.3f} images/s",
            f"bare model calls {count / close['bare']:.3f}/s",
            close["bare"] / close["fp32"],
            "at least 0.97",
        ),
        Row(
            f"sampling, bf16, {what}",
            f"{rate['bf16']} images/s; from the same noise the latents are {moved:.1e} away (relative rms)",
            f"sampling, fp32 {rate['fp32']}/s",
            seconds["fp32"] / seconds["bf16"],
        ),
        Row(
            f"both halves of guidance in one model call, fp32, {what}",
            f"{rate['bare']} images/s",
            f"one half after the other {rate['apart']}/s",
            seconds["apart"] / seconds["bare"],
        ),
    ]
    against = f"plain chain, {plain_precision} {rate['plain']}/s"
    return rows + [
        Row(f"sampling, {name}, {what}", f"{rate[name]} images/s", against, seconds["plain"] / seconds[name])
        for name in _PRECISIONS
    ]


def _plain_run(chain: "PlainChain", labels: Sequence[int], device: torch.device) -> Callable[[], object]:
    """Run the plain chain in its own precision, then restore the precision of the other runs."""
    config, y = chain.model.config, torch.tensor(labels, device=device)

    def run() -> None:
        use_precision(plain_precision(device))
        chain(torch.randn(len(y), config.in_channels, config.latent_size, config.latent_size, device=device), y)
        use_precision("fp32")

    return run


@torch.no_grad()
def bare_calls(
    model: DiffusionTransformer, timesteps: Sequence[int], labels: Sequence[int], *, at_once: bool
) -> Tensor:
    """Only the model calls of a guided chain: one of 2N rows, or two of N, per step. Returns the last output."""
    config, device = model.config, next(model.parameters()).device
    x = torch.randn(2 * len(labels), config.in_channels, config.latent_size, config.latent_size, device=device)
    y = torch.tensor([*labels, *[config.num_classes] * len(labels)], device=device)
    rows = len(x) if at_once else len(labels)
    output = x
    for timestep in timesteps:
        t = torch.full((rows,), timestep, device=device)
        for part, of in zip(x.split(rows), y.split(rows), strict=True):
            output = model(part, t, of)
    return output


def _relative_rms(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())


# --- a whole evaluation beside a plain one


class Measured(NamedTuple):
    """Median seconds of whole evaluations, and the seconds of each of their stages alone."""

    seconds: float
    stages: Stages

    def with_more_steps(self, seconds: float) -> "Measured":
        """The same with additional sampling steps that take `seconds`."""
        longer = self.stages._replace(sampling=self.stages.sampling + seconds)
        return Measured(self.seconds + seconds, longer)


def _whole(
    work: Path,
    subject: EvalSubject,
    networks: Networks,
    device: torch.device,
    turns: int,
    step_s: Mapping[str, float],
) -> list[Row]:
    """Rows of an evaluation in each precision beside the plain one, as measured and at FULL_STEPS.

    `step_s` are the seconds per step and image of each chain: the time of the missing steps is computed from them.
    """
    inputs = as_inputs(networks, work)
    plain = PlainEvaluation(work / "plain", subject, networks, device)
    runs: dict[str, OurEvaluation | PlainEvaluation] = {
        **{name: OurEvaluation(work / name, subject, name, device, inputs) for name in _PRECISIONS},
        "plain": plain,
    }
    measured = _measured(runs, turns)
    rows = [_whole_row(subject, name, measured, plain.precision, device, "") for name in _PRECISIONS]
    if subject.steps < FULL_STEPS:
        missing = subject.num_images * (FULL_STEPS - subject.steps)
        full = {name: side.with_more_steps(missing * step_s[name]) for name, side in measured.items()}
        how = f" (sampling time scaled from {subject.steps} steps)"
        rows += [_whole_row(subject, name, full, plain.precision, device, how) for name in _PRECISIONS]
    return rows


def _measured(runs: Mapping[str, "OurEvaluation | PlainEvaluation"], turns: int) -> dict[str, Measured]:
    """Measure the stages of one unit, which is also the warm-up, then whole runs in turns."""
    stages = {name: run.stages() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            with timed(seconds[name]):
                run()
    return {name: Measured(statistics.median(durations), stages[name]) for name, durations in seconds.items()}


def _whole_row(
    subject: EvalSubject,
    name: str,
    measured: Mapping[str, Measured],
    plain_precision: str,
    device: torch.device,
    how: str,
) -> Row:
    """The row of one precision. Its target is for FULL_STEPS: with fewer, the decoder, equal in both, weighs more."""
    ours, plain = measured[name], measured["plain"]
    steps = FULL_STEPS if how else subject.steps
    return Row(
        f"whole evaluation, {name}, {subject.model} at {subject.image_size}, {subject.num_images} images, guided, at "
        f"{steps} steps{how}",
        f"{subject.num_images / ours.seconds:.4f} images/s, {ours.seconds:.1f} s; {ours.stages}",
        f"plain, {plain_precision}, {plain.seconds:.1f} s; {plain.stages}",
        plain.seconds / ours.seconds,
        _WHOLE_TARGETS.get((device.type, name), "") if steps == FULL_STEPS else "",
    )


class OurEvaluation:
    """The job's worker in this process, with two units at once in threads, as in the job."""

    def __init__(
        self, work: Path, subject: EvalSubject, precision: str, device: torch.device, inputs: dict[str, Any]
    ) -> None:
        self.work, self.config = work, subject.sample_config(precision, device)
        self.runs = itertools.count()
        self.sampler = Sampler(self.config, inputs, self._new_writer())

    def __call__(self) -> None:
        """Write the files of all units into a new folder."""
        use_precision("fp32")
        self.sampler.out = self._new_writer()
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(self.sampler.work, range(units_per_repeat(self.config))))

    def stages(self) -> Stages:
        """The seconds of each stage of one unit alone, times the number of units."""
        use_precision("fp32")
        indices = unit_of(self.config, 0).indices
        seconds: list[float] = []
        with timed(seconds):  # the sampler reads the latents at its end, and so waits for the device
            latents = self.sampler.latents(indices % self.sampler.num_classes, self.config.seed, indices)
        with timed(seconds):
            pixels = decode_to_pixels(self.sampler.autoencoder, latents, self.sampler.latents.model.config)
        with timed(seconds):
            self.sampler.extractors["inception"](pixels)
        return of_all(seconds, self.config.num_samples / len(indices))

    def _new_writer(self) -> ArtifactWriter:
        return ArtifactWriter(Folder.at(self.work / str(next(self.runs))), "features", "benchmark")

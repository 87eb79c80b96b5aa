"""Times of a pipeline's steps at the rates that were measured on the user's own card.

A step takes its counted operations over the operations per second of the measured row that is most like it. What a rate
does not contain is not in the time: the exchange of gradients, previews, checkpoints, and loading of networks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any

import torch

from edt_core.autoencoders.parts import images_per_call
from edt_core.config import SampleConfig, TrainConfig
from edt_core.diffusion import objective_of, with_objective
from edt_core.errors import UserError
from edt_core.models import ModelConfig, model_config
from edt_core.sampling.cache import mean_macs
from edt_core.training.speed.compiled import is_compiled
from edt_core.training.start.trainable import step_flops
from pipelines.config.guide import OWN_SAMPLES
from pipelines.config.schema import PipelineConfig
from pipelines.setup.acceptance_file import (
    FACTOR,
    FULL_SIZE,
    LATENT_CHANNELS,
    Job,
    Measurements,
    Work,
    autoencoder_flops,
    forward_flops,
)

_NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class StepTime:
    """The time of a step on some devices.

    flops: None if they cannot be counted. hours: None if no row is like the step. source: the row of the rate.
    """

    step: str
    work: str
    precision: str
    flops: int | None
    hours: float | None
    source: str


@dataclass(frozen=True)
class Setting:
    """What times are estimated for: a pipeline with its number of images and their side, on some devices.

    `guide`: the model of another training that samples are guided away from; None for none, or not another one.
    """

    measured: Measurements
    config: PipelineConfig
    image_size: int
    images: int
    devices: int
    guide: ModelConfig | None = None


def trainings_of(config: PipelineConfig, models: Sequence[str]) -> list[tuple[TrainConfig, ...]]:
    """The trainings of each named model, by the recipe of a configuration; without names, those of its own models.

    A model has one for each of its seeds. A named model has none of the recipe's overrides, which may be of another
    family.
    """
    own = [config.trainings_of(name) for name in config.models]
    usual: dict[str, Any] = {"model_overrides": {}, "width": None}
    named = [tuple(train.model_copy(update={"model": model, **usual}) for train in own[0]) for model in models]
    return named or own


def step_times(setting: Setting, trainings: Sequence[Sequence[TrainConfig]]) -> list[StepTime]:
    """The times of encoding, and of training and sampling each model with its seeds.

    Raises UserError if sizes do not fit.
    """
    count, encode = setting.images, setting.config.encode
    times = [_coder_time(setting, "encode", "encode", f"{count:,} images, mirrored too", 2 * count, encode.precision)]
    for seeds in trainings:
        train, number = seeds[0], len(seeds)
        model = _model(setting, train)
        own = [] if setting.config.sample.guide != OWN_SAMPLES else _own_times(setting, train, model, number)
        times += [_train_time(setting, train, model, number), *own, *_sample_times(setting, train, model, number)]
    return times


def _model(setting: Setting, train: TrainConfig) -> ModelConfig:
    autoencoder = setting.config.autoencoder
    try:
        model = model_config(
            train.model,
            setting.image_size,
            autoencoder_factor=autoencoder.downsample_factor,
            latent_channels=autoencoder.latent_channels,
            overrides=train.model_overrides,
            width=train.width,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return with_objective(model, train.objective)


def _coder_time(setting: Setting, step: str, work: Work, text: str, images: int, precision: str) -> StepTime:
    """The time to encode or decode images."""
    autoencoder = setting.config.autoencoder
    shape = autoencoder.downsample_factor, autoencoder.latent_channels
    if autoencoder.pretrained is None or shape != (FACTOR, LATENT_CHANNELS):
        source = f"{_NOT_MEASURED}: the autoencoder has another shape than SD-VAE"
        return StepTime(step, text, precision, None, None, source)
    size = setting.image_size
    job = Job(work, precision, autoencoder_flops(work, size), batch=images_per_call(size))
    return _time(setting, step, text, job, images)


def _train_time(setting: Setting, train: TrainConfig, model: ModelConfig, number: int) -> StepTime:
    """The time of so many trainings, one after the other."""
    steps, batch = train.total_steps(setting.images), train.global_batch_size
    images, times = number * steps * batch, "" if number == 1 else f"{number} x "
    recipe = train.model_copy(update={"masked_loss": train.masked_loss and model.is_masked})
    job = Job(
        "train",
        train.precision,
        step_flops(recipe, model),
        train.model,
        max(1, batch // setting.devices),
        is_compiled(train, torch.device("cuda" if setting.measured.on_gpu else "cpu")),
    )
    time = _time(setting, f"train {train.model}", f"{times}{steps:,} steps of {batch:,}", job, images)
    if model.image_size == FULL_SIZE:
        time = _fed(setting, time, images, batch)
    most = None if train.max_hours is None else number * train.max_hours
    if most is not None and time.hours is not None and time.hours > most:
        return replace(time, hours=most, source=f"train.max_hours; {time.source}")
    return time


def _fed(setting: Setting, time: StepTime, images: int, batch: int) -> StepTime:
    """The time of a training, which is longer if the hosts prepare images more slowly than devices train on them."""
    feeding, devices = setting.measured.feeding, setting.devices
    if time.hours is None or not feeding:
        return time
    key = min(feeding, key=lambda key: (abs(log(key[1] / devices)), abs(log(key[0] / batch))))
    hours = images / feeding[key] / devices / 3600
    if hours <= time.hours:
        return time
    return replace(time, hours=hours, source=f"limited by feeding, batch {key[0]}, one rank of {key[1]}")


def _sample_times(setting: Setting, train: TrainConfig, model: ModelConfig, number: int) -> Iterator[StepTime]:
    """Chains and decoding, of so many trained models and, if they start from random weights, of an untrained one."""
    sample = setting.config.sample
    sets = number + (not train.init_from)
    each = sample.num_samples * sample.repeats
    text, count = f"{'' if sets == 1 else f'{sets} x '}{each:,} samples", sets * each
    amm = bool(sample.amm_blocks)
    flops = _pass_flops(sample, train, model)
    job = Job("sample", sample.precision, flops, train.model, sample.unit_size, amm=amm)
    share = 1.0 if setting.guide is None else _pass_flops(sample, train, setting.guide) / flops
    passes = round(count * chain_passes(sample, train, share))
    yield _time(setting, f"sample {train.model}", f"{text} of {sample.num_sampling_steps} steps", job, passes)
    yield _coder_time(setting, f"decode {train.model}", "decode", text, count, "fp32")
    if sample.guidance_reference == "confused":  # each guided step decodes what it predicts
        guided = round(count * (chain_passes(sample, train) - chain_passes(sample, train, 0.0)))
        yield _coder_time(setting, f"classify {train.model}", "decode", f"{guided:,} predictions", guided, "fp32")


def _own_times(setting: Setting, train: TrainConfig, model: ModelConfig, number: int) -> Iterator[StepTime]:
    """The samples that a copy of each of so many models is trained on, drawn without guidance, and that training."""
    sims, sample = setting.config.sims, setting.config.sample
    calls = objective_of(train.objective).calls(sample.sampler, sample.num_sampling_steps)
    flops, times = _pass_flops(sample, train, model), "" if number == 1 else f"{number} x "
    text, passes = f"{times}{sims.num_samples:,} samples", round(number * sims.num_samples * calls)
    job = Job("sample", sample.precision, flops, train.model, sample.unit_size, amm=bool(sample.amm_blocks))
    yield _time(setting, f"sample own {train.model}", text, job, passes)
    of_copy = _train_time(replace(setting, images=sims.num_samples), sims.training_of(train), model, number)
    yield replace(of_copy, step=f"train own {train.model}")


def _pass_flops(sample: SampleConfig, train: TrainConfig, model: ModelConfig) -> int:
    """Operations of a forward pass for one image, on average over the passes of a chain with a cache."""
    if sample.cache is None:
        return forward_flops(model)
    calls = objective_of(train.objective).calls(sample.sampler, sample.num_sampling_steps)
    return round(2 * mean_macs(model, sample.cache, round(calls)))


def chain_passes(config: SampleConfig, train: TrainConfig, guide_share: float = 1.0) -> float:
    """Forward passes for one sample: those of the sampler's steps, and as many again where steps are guided.

    `guide_share`: what a pass of the guide costs, as a share of a pass of the model.
    """
    objective = objective_of(train.objective)
    calls = objective.calls(config.sampler, config.num_sampling_steps)
    if config.cfg_scale == 1.0:
        return calls
    last = objective.end_of_time(train.num_timesteps)
    first, end = config.guidance_interval or (0, last)
    return calls * (1 + guide_share * max(0.0, min(end, last) - first) / last)


def _time(setting: Setting, step: str, text: str, job: Job, calls: int) -> StepTime:
    """The time of so many images, or passes, of a job."""
    flops = calls * job.flops
    rate = nearest_rate(setting.measured, job)
    if rate is None:
        return StepTime(step, text, job.precision, flops, None, _NOT_MEASURED)
    flops_per_s, source = rate
    return StepTime(step, text, job.precision, flops, flops / flops_per_s / setting.devices / 3600, source)


def nearest_rate(measured: Measurements, job: Job) -> tuple[float, str] | None:
    """The operations per second that a job reaches, and the row that they come from; None if no row has its work.

    Rows of the job's precision come first; those of another one are scaled by the rates of matrix products. Of these,
    the row is taken of the same model, then the one with the nearest number of operations, compiled or not as the job,
    with AMM or not, and the nearest batch.
    """
    rates = [rate for rate in measured.rates if rate.job.work == job.work]
    same = [rate for rate in rates if rate.job.precision == job.precision]
    products = measured.products
    other = [rate for rate in rates if {rate.job.precision, job.precision} <= products.keys()]
    if not (candidates := same or other):
        return None
    rate = min(candidates, key=lambda rate: _distance(rate.job, job))
    if not same:
        factor = products[job.precision] / products[rate.job.precision]
        return rate.flops_per_s * factor, f"scaled from {rate.row}, by matrix products in {job.precision}"
    is_own = (rate.job.model, rate.job.flops) == (job.model, job.flops)
    return rate.flops_per_s, rate.row if is_own else f"scaled from {rate.row}"


def _distance(row: Job, job: Job) -> tuple[bool, float, bool, bool, float]:
    """How little a row is like a job, the most important difference first."""
    size, batch = round(abs(log(row.flops / job.flops)), 6), abs(log(row.batch / job.batch))
    return row.model != job.model, size, row.compiled != job.compiled, row.amm != job.amm, batch

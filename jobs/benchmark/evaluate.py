"""How fast samples are drawn and judged: the sampler beside bare calls of its model, a whole evaluation beside a plain.

Each ratio is against something measured in the same run, in turns with it: a shared machine's speed drifts. All weights
are made at random. Legend: N images, C latent channels, h side of the latents, S image side, T steps of a chain.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from edt_core.artifact import Artifact, ArtifactWriter, Source
from edt_core.autoencoder import decode_to_pixels
from edt_core.config import ChainConfig, SampleConfig
from edt_core.diffusion import Schedule, linear_schedule, sampling_schedule
from edt_core.extractors.inception import SPATIAL_CHANNELS, InceptionNetwork, tf1_resize
from edt_core.generation import LatentSampler
from edt_core.models import EDT, ModelConfig, model_config
from edt_core.precision import use_precision
from edt_core.schema import EMA_WEIGHTS, MODEL_CONFIG
from edt_core.storage import Folder, sha256_file
from jobs.autoencoder import FOLDER
from jobs.benchmark.authors import plain_model
from jobs.benchmark.table import Row, timed
from jobs.benchmark.train import in_turns
from jobs.sample import Sampler, unit_of, units_per_repeat

FULL_STEPS = 250  # of a published evaluation
_NUM_TIMESTEPS = 1000
_CFG_SCALE, _GUIDED_CHANNELS = 1.5, 3
_STEPS_ALONE = 3  # of the chains that are compared with bare calls
_PRECISIONS = ("fp32", "bf16")
_WHOLE_TARGETS = {("cpu", "fp32"): "at least 1.5", ("cpu", "bf16"): "at least 1.5", ("cuda", "bf16"): "at least 4"}


@dataclass(frozen=True)
class EvalSubject:
    """What is evaluated: a named model for images of a size, `num_images` of them in units of `unit_size`.

    The sampler alone draws `batch_size` images. The autoencoder's channels are those of Stable Diffusion.
    """

    model: str = "EDT-S/2"
    image_size: int = 256
    batch_size: int = 8
    num_images: int = 8
    unit_size: int = 4
    steps: int = 20
    autoencoder_channels: tuple[int, ...] = (128, 256, 512, 512)

    @classmethod
    def on(
        cls, device: str, model: str, image_size: int, num_images: int | None = None, scale: float = 1
    ) -> "EvalSubject":
        """What takes some minutes on a device; `scale` below 1 takes fewer images and steps."""
        images, unit, steps = (256, 64, FULL_STEPS) if device == "cuda" else (8, 4, 20)
        images = max(2, int((num_images or images) * min(scale, 1)))
        unit = min(unit, -(-images // 2))  # two units at least, for their stages to overlap
        return cls(model, image_size, 2 * unit, images, unit, max(2, int(steps * min(scale, 1))))

    @property
    def model_config(self) -> ModelConfig:
        return model_config(self.model, self.image_size)

    def sample_config(self, precision: str, device: torch.device) -> SampleConfig:
        return SampleConfig(
            **_chain(precision, self.steps).model_dump(),
            num_samples=self.num_images,
            unit_size=self.unit_size,
            keep_images=1,  # of 50,000 samples the first 100 are kept: next to none
            num_cpus_per_worker=torch.get_num_threads(),
            num_gpus_per_worker=float(device.type == "cuda"),
        )


def bench_eval(work: Path, subject: EvalSubject, turns: int) -> Iterator[list[Row]]:
    """The rows of each measurement as it is done; chains are drawn `turns` times, whole sets a fifth as often."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks = made_networks(subject)
    rows, step_s = _sampling(subject, networks.model, device, turns)
    yield rows
    yield _whole(work, subject, networks, device, max(1, turns // 5), step_s)


def _chain(precision: str, steps: int) -> ChainConfig:
    return ChainConfig.model_validate(
        {
            "num_sampling_steps": steps,
            "cfg_scale": _CFG_SCALE,
            "guidance_channels": _GUIDED_CHANNELS,
            "precision": precision,
        }
    )


# --- the networks, and the artifacts that they are to the job


class Networks(NamedTuple):
    """A model, an AutoencoderKL and an Inception whose norms are not folded."""

    model: EDT
    autoencoder: Any
    inception: InceptionNetwork


def made_networks(subject: EvalSubject) -> Networks:
    """Networks of random weights, the same at each call, for evaluation, on the CPU."""
    from diffusers import AutoencoderKL

    levels = len(subject.autoencoder_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inception = EDT(subject.model_config), InceptionNetwork()
        autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=subject.autoencoder_channels,
            layers_per_block=2,
            latent_channels=4,
            sample_size=subject.image_size,
        )
        for parameter in model.parameters():
            if not parameter.any():  # a fresh model's output is zero, in whatever precision
                nn.init.normal_(parameter, std=0.02)
        for module in inception.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    for network in (model, autoencoder, inception):
        network.eval().requires_grad_(False)
    return Networks(model, autoencoder, inception)


def as_inputs(networks: Networks, work: Path) -> dict[str, Artifact | Source]:
    """The networks as inputs of the job, written below `work`."""
    checkpoint = ArtifactWriter(Folder.at(work / "checkpoint"), "checkpoint", "benchmark")
    checkpoint.write_json(f"step/{MODEL_CONFIG}", networks.model.config.to_dict())
    checkpoint.write(f"step/{EMA_WEIGHTS}", partial(save_file, networks.model.state_dict()))
    autoencoder = ArtifactWriter(Folder.at(work / "autoencoder"), "autoencoder", "benchmark")
    networks.autoencoder.save_pretrained(work / "pretrained")
    autoencoder.add_tree(work / "pretrained", FOLDER)
    weights = work / "inception.pth"
    torch.save(networks.inception.state_dict(), weights)
    return {
        "checkpoint": checkpoint.commit({"num_timesteps": _NUM_TIMESTEPS}, {}, {"final": "step"}),
        "autoencoder": autoencoder.commit({}, {}, {}),
        "inception": Source(str(weights), sha256_file(weights)),
    }


# --- the sampler beside bare calls of its model


def _sampling(subject: EvalSubject, made: EDT, device: torch.device, turns: int) -> tuple[list[Row], dict[str, float]]:
    """Rows of chains in both precisions, of a plain chain, and of the model calls of one, at once or half by half.

    Also the seconds that a step of each chain takes for an image.
    """
    use_precision("fp32")
    model, count = made.to(device), subject.batch_size
    indices = list(range(count))
    labels = [index % model.config.num_classes for index in indices]
    samplers = {name: LatentSampler(model, _chain(name, _STEPS_ALONE), _NUM_TIMESTEPS) for name in _PRECISIONS}
    moved = _relative_rms(samplers["bf16"](labels, 0, indices), samplers["fp32"](labels, 0, indices))
    schedule = sampling_schedule(linear_schedule(_NUM_TIMESTEPS), _STEPS_ALONE)
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
    # What differs by a few percent takes turns with nothing else: what came before, the plain chain most of all, tells
    # in the time of a run.
    close, seconds = in_turns(pair, turns, device), in_turns(runs, max(1, turns // 2), device)
    step_s = {name: taken / (count * _STEPS_ALONE) for name, taken in seconds.items()}
    return _sampling_rows(subject, close, seconds, moved, _plain_precision(device)), step_s


def _sampling_rows(
    subject: EvalSubject, close: Mapping[str, float], seconds: Mapping[str, float], moved: float, plain_precision: str
) -> list[Row]:
    count = subject.batch_size
    rate = {name: f"{count / taken:.3f}" for name, taken in seconds.items()}
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
    """The plain chain of some labels, in its own precision; then that of the others again."""
    config, y = chain.model.config, torch.tensor(labels, device=device)

    def run() -> None:
        use_precision(_plain_precision(device))
        chain(torch.randn(len(y), config.in_channels, config.latent_size, config.latent_size, device=device), y)
        use_precision("fp32")

    return run


def _plain_precision(device: torch.device) -> str:
    """As the authors sample: on a GPU they turn TF32 on."""
    return "fp32" if device.type == "cpu" else "tf32"


@torch.no_grad()
def bare_calls(model: EDT, timesteps: Sequence[int], labels: Sequence[int], *, at_once: bool) -> Tensor:
    """The model calls of a guided chain with nothing else: of 2N rows, or twice of N. Returns the last output."""
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


class Stages(NamedTuple):
    """Seconds of each stage by itself, for all images."""

    sampling: float
    decoding: float
    features: float

    def __str__(self) -> str:
        names = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._asdict().items())
        return f"{names} s alone"


class Measured(NamedTuple):
    """Median seconds of whole evaluations, and what each of their stages takes alone."""

    seconds: float
    stages: Stages

    def with_more_steps(self, seconds: float) -> "Measured":
        """With steps that would take some seconds more."""
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

    `step_s` is what a step of each chain takes for an image, in seconds: the missing steps are added at that.
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
        full = {name: found.with_more_steps(missing * step_s[name]) for name, found in measured.items()}
        how = f" (sampling time scaled from {subject.steps} steps)"
        rows += [_whole_row(subject, name, full, plain.precision, device, how) for name in _PRECISIONS]
    return rows


def _measured(runs: Mapping[str, "OurEvaluation | PlainEvaluation"], turns: int) -> dict[str, Measured]:
    """Each once, in a turn; the stages of one unit before, which is the warm-up as well."""
    stages = {name: run.stages() for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            with timed(seconds[name]):
                run()
    return {name: Measured(statistics.median(taken), stages[name]) for name, taken in seconds.items()}


def _whole_row(
    subject: EvalSubject,
    name: str,
    measured: Mapping[str, Measured],
    plain_precision: str,
    device: torch.device,
    how: str,
) -> Row:
    """One precision's row. The target is that of FULL_STEPS: with fewer the decoder, the same in both, weighs more."""
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
    """The job's worker in this process, with two units at once in threads, as the job gives them to it."""

    def __init__(
        self, work: Path, subject: EvalSubject, precision: str, device: torch.device, inputs: dict[str, Any]
    ) -> None:
        self.work, self.config = work, subject.sample_config(precision, device)
        self.runs = itertools.count()
        self.sampler = Sampler(self.config, inputs, self._new_writer())

    def __call__(self) -> None:
        """Every unit's file, in a folder of its own."""
        use_precision("fp32")
        self.sampler.out = self._new_writer()
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(self.sampler.work, range(units_per_repeat(self.config))))

    def stages(self) -> Stages:
        """Each stage of one unit by itself, times the number of units."""
        use_precision("fp32")
        indices = unit_of(self.config, 0).indices
        seconds: list[float] = []
        with timed(seconds):  # its end looks at the latents, and so waits for the device
            latents = self.sampler.latents(indices % self.sampler.num_classes, self.config.seed, indices)
        with timed(seconds):
            pixels = decode_to_pixels(self.sampler.autoencoder, latents)
        with timed(seconds):
            self.sampler.extractors["inception"](pixels)
        return _of_all(seconds, self.config.num_samples / len(indices))

    def _new_writer(self) -> ArtifactWriter:
        return ArtifactWriter(Folder.at(self.work / str(next(self.runs))), "features", "benchmark")


class PlainEvaluation:
    """The way of DiT's and EDT's authors, and of those who measure their samples: one thing after the other, eager.

    A plain model and chain; each image a PNG; in a second pass every PNG read back, one at a time, for an Inception as
    it was trained. In float32, as the authors with TF32 on a GPU. All features end in one npz.
    """

    def __init__(self, work: Path, subject: EvalSubject, networks: Networks, device: torch.device) -> None:
        self.work, self.subject, self.device = work, subject, device
        self.precision = _plain_precision(device)
        self.runs = itertools.count()
        schedule = sampling_schedule(linear_schedule(_NUM_TIMESTEPS), subject.steps)
        self.chain = PlainChain(plain_model(networks.model).to(device).eval(), schedule)
        self.autoencoder, self.inception = networks.autoencoder.to(device), networks.inception.to(device)
        # The spatial features are not used here; the network wants their kernels all the same.
        branch = self.inception.get_submodule("Mixed_6d.branch1x1.conv")
        self.inception.spatial_kernel = branch.get_parameter("weight")[:SPATIAL_CHANNELS]

    def __call__(self) -> None:
        """A PNG of every image, and their features."""
        self._run(self.subject.num_images)

    def stages(self) -> Stages:
        """The stages of one unit, times the number of units."""
        unit = self.subject.unit_size
        return _of_all(self._run(unit), self.subject.num_images / unit)

    def _run(self, count: int) -> list[float]:
        """Seconds of sampling, of decoding and writing, and of reading and features."""
        use_precision(self.precision)
        folder = self.work / str(next(self.runs))
        folder.mkdir(parents=True)
        sampling: list[float] = []
        decoding: list[float] = []
        features: list[float] = []
        for batch in _batches(count, self.subject.unit_size):
            with timed(sampling):
                latents = self._sample(batch)
            with timed(decoding):
                self._write(folder, batch, latents)
        with timed(features):
            found = [self.features(_read(folder, batch)) for batch in _batches(count, self.subject.unit_size)]
            np.savez(folder / "features.npz", features=np.concatenate(found))
        return [sum(sampling), sum(decoding), sum(features)]

    def _sample(self, batch: range) -> Tensor:
        config = self.chain.model.config
        shape = (len(batch), config.in_channels, config.latent_size, config.latent_size)
        labels = torch.tensor([index % config.num_classes for index in batch], device=self.device)
        latents = self.chain(torch.randn(shape, device=self.device), labels)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # for the clock alone
        return latents

    @torch.no_grad()
    def _write(self, folder: Path, batch: range, latents: Tensor) -> None:
        images = self.autoencoder.decode(latents / self.autoencoder.config.scaling_factor).sample
        levels = torch.clamp(127.5 * images + 128.0, 0, 255).permute(0, 2, 3, 1).to("cpu", dtype=torch.uint8).numpy()
        for index, pixels in zip(batch, levels, strict=True):
            Image.fromarray(pixels).save(folder / f"{index:06d}.png")

    @torch.no_grad()
    def features(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [N, S, S, 3] -> [N, 2048]."""
        images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).contiguous()
        pooled, _, _ = self.inception((tf1_resize(images) - 128) / 128)
        found: NDArray[np.float32] = pooled.cpu().numpy()
        return found


class PlainChain:
    """The ancestral chain with guidance as DiT's authors write it: both halves of the batch are carried along.

    The coefficients of a step are looked up by sample, from tables that are copied to the device each time.
    """

    def __init__(self, model: EDT, schedule: Schedule) -> None:
        self.model, self.schedule = model, schedule
        ab, ab_before, betas = schedule.alphas_cumprod, schedule.alphas_cumprod_prev, schedule.betas
        self.from_x, self.from_eps = np.sqrt(1 / ab), np.sqrt(1 / ab - 1)
        self.mean_of_start = betas * np.sqrt(ab_before) / (1 - ab)
        self.mean_of_x = (1 - ab_before) * np.sqrt(1 - betas) / (1 - ab)

    @torch.no_grad()
    def __call__(self, initial: Tensor, labels: Tensor, draw: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
        """Latents [N, C, h, h] from noise of that shape and labels [N]; draw(x) is the noise of a step, like x."""
        null = torch.full_like(labels, self.model.config.num_classes)
        x, y = torch.cat([initial, initial]), torch.cat([labels, null])
        for index in reversed(range(self.schedule.num_timesteps)):
            x = self._step(x, torch.tensor([index] * len(x), device=x.device), y, draw)
        return x.chunk(2)[0]

    def _step(self, x: Tensor, t: Tensor, y: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        """x_{t-1} of x_t, with the variance that the model learned (Ho 2020, algorithm 2)."""
        eps, v = self._guided(x, t, y).chunk(2, dim=1)
        least = _at(self.schedule.posterior_log_variance_clipped, t, x)
        most = _at(np.log(self.schedule.betas), t, x)
        share = (v + 1) / 2
        log_variance = share * most + (1 - share) * least
        start = _at(self.from_x, t, x) * x - _at(self.from_eps, t, x) * eps
        mean = _at(self.mean_of_start, t, x) * start + _at(self.mean_of_x, t, x) * x
        goes_on = (t != 0).float().view(-1, 1, 1, 1)
        return mean + goes_on * torch.exp(0.5 * log_variance) * draw(x)

    def _guided(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The model on the first half of x with and without its labels, [2N, 2C, h, h]; both halves are guided."""
        half = x[: len(x) // 2]
        timesteps = torch.tensor(self.schedule.timestep_map, device=t.device)[t]
        output: Tensor = self.model(torch.cat([half, half]), timesteps, y)
        eps, rest = output[:, :_GUIDED_CHANNELS], output[:, _GUIDED_CHANNELS:]
        conditional, unconditional = eps.chunk(2)
        pushed = unconditional + _CFG_SCALE * (conditional - unconditional)
        return torch.cat([torch.cat([pushed, pushed]), rest], dim=1)


def _at(table: NDArray[np.float64], t: Tensor, like: Tensor) -> Tensor:
    """The entries of a table at t, [N], in the shape of `like`."""
    return torch.from_numpy(table).to(t.device)[t].float().view(-1, 1, 1, 1).expand(like.shape)


def _batches(count: int, size: int) -> list[range]:
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _read(folder: Path, batch: range) -> NDArray[np.uint8]:
    return np.stack([np.asarray(Image.open(folder / f"{index:06d}.png")) for index in batch])


def _of_all(seconds: Sequence[float], units: float) -> Stages:
    return Stages(*(units * taken for taken in seconds))

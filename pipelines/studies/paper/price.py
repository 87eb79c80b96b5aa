"""What a table costs at full scale, before anything runs: operations by formula, for all of its trainings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edt_core.config import ChainConfig
from edt_core.models import macs_of
from edt_core.training.start.trainable import step_flops
from pipelines.config.schema import PipelineConfig
from pipelines.pipeline.branches import untrained_of
from pipelines.setup.disk import disk_needs, largest_first, size_text

CLASSES, IMAGES = 1000, 1_281_167  # of ILSVRC2012
_SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Price:
    """Operations of the trainings and the chains of a table, each counted once.

    `trainings`: their number. `training`, `sampling`: floating-point operations, two for a multiply-accumulate; the
    chains are those of trained and untrained models, and along the training. Encoding, decoding and feature networks
    are left out. `disk`: bytes by kind.
    """

    trainings: int
    training: float
    sampling: float
    disk: Mapping[str, int]

    def lines(self, tflops: float) -> Iterator[str]:
        """The price as text, at a rate of operations a GPU."""
        for what, operations in (("training", self.training), ("sampling", self.sampling)):
            days = operations / (tflops * 1e12) / _SECONDS_A_DAY
            yield f"  {what:<10} {operations:.3g} FLOPs, {days:,.3g} GPU-days at {tflops:g} TFLOP/s"
        yield f"  {'disk':<10} about {size_text(sum(self.disk.values()))}: {largest_first(self.disk)}"


def price_of(configs: Sequence[PipelineConfig], classes: int = CLASSES, images: int = IMAGES) -> Price:
    """The price of some pipelines on a data set of this size. A training that several have is counted once."""
    trained: dict[str, float] = {}
    sampled: dict[str, float] = {}
    disk: dict[str, int] = {}
    for config in configs:
        for name in config.models:
            trainings, model = config.trainings_of(name), config.model_of(name, classes)
            macs, along = macs_of(model), config.along
            for train in (*trainings, *([] if trainings[0].init_from else [untrained_of(trainings[0])])):
                key = f"{train.model_dump_json()} {config.sample.model_dump_json()}"
                sampled[key] = _drawn(config.sample, macs, config.sample.num_samples * config.sample.repeats)
            for train in trainings:
                steps = train.total_steps(images)
                trained[train.model_dump_json()] = float(steps * train.global_batch_size * step_flops(train, model))
            if along.every is not None:
                points = trainings[0].total_steps(images) // along.every
                key = f"{trainings[0].model_dump_json()} {along.model_dump_json()}"
                sampled[key] = _drawn(along, macs, points * along.num_samples)
        needs = disk_needs(config, images, classes)
        shared = {kind: max(size, disk.get(kind, 0)) for kind, size in needs.items() if kind in ("images", "latents")}
        disk |= shared | {kind: disk.get(kind, 0) + size for kind, size in needs.items() if kind not in shared}
    return Price(len(trained), sum(trained.values()), sum(sampled.values()), disk)


def _drawn(chain: ChainConfig, macs: int, samples: int) -> float:
    """Operations of the chains of so many samples."""
    return 2.0 * macs * chain.num_sampling_steps * (2 if chain.cfg_scale > 1 else 1) * samples

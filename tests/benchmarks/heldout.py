"""What the held-out loss costs: `python tests/benchmarks/heldout.py [--model EDT-Tiny/2] [--held-out 64]`.

A training on random latents with the default `validate_every`, over a whole number of intervals. Prints the share of
its processor time that the measurements took, and that of one measurement in steps, as a Markdown table.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edt_core.config import TrainConfig
from edt_core.data.holdout import Holdout
from edt_core.data.latents import LatentDataset, LatentInfo, LatentShardWriter
from edt_core.data.scale import LatentScale
from edt_core.models import model_config
from edt_core.training.context import LocalContext
from edt_core.training.loop import train
from edt_core.training.validation.measure import HeldOutLoss, validation_interval

IMAGES = 2000


def latents(folder: Path, shape: tuple[int, int, int], image_size: int) -> LatentDataset:
    rng, path = np.random.default_rng(0), folder / "latents.arrow"
    with LatentShardWriter(
        path, LatentInfo("random", LatentScale(1.0), image_size, shape, "images-00000.tar")
    ) as writer:
        posterior = rng.normal(size=(IMAGES, 2, 2, *shape)).astype(np.float32)
        writer.write([str(row) for row in range(IMAGES)], rng.integers(0, 10, IMAGES), np.abs(posterior))
    return LatentDataset([path])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="EDT-Tiny/2")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--intervals", type=int, default=1)
    arguments = parser.parse_args()
    model = model_config(arguments.model, arguments.image_size, 10)
    fields = {"model": arguments.model, "global_batch_size": arguments.batch_size, "masked_loss": model.is_masked}
    every = validation_interval(TrainConfig(**fields), arguments.held_out)
    config = TrainConfig(**fields, max_steps=every * arguments.intervals, checkpoint_every=10**9)
    rows = np.arange(arguments.held_out)
    digests = np.random.default_rng(1).integers(0, 256, (len(rows), 32)).astype(np.uint8)
    spent: list[float] = []
    measure = HeldOutLoss.measure

    def timed(self: HeldOutLoss, weights: Any) -> dict[str, float]:
        started = time.process_time()
        values = measure(self, weights)
        spent.append(time.process_time() - started)
        return values

    HeldOutLoss.measure = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        dataset = latents(Path(folder), (model.in_channels, model.latent_size, model.latent_size), arguments.image_size)
        started = time.process_time()
        train(config, model, dataset, LocalContext(Path(folder) / "run"), holdout=Holdout(rows, rows, digests))
        total = time.process_time() - started
    step = (total - sum(spent)) / config.max_steps
    print("| model | batch | held out | steps | measured every | share of the time | a measurement, in steps |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {arguments.model} | {arguments.batch_size} | {arguments.held_out} | {config.max_steps} | {every} | "
        f"{100 * sum(spent) / total:.2f} % | {np.mean(spent) / step:.1f} |"
    )


if __name__ == "__main__":
    main()

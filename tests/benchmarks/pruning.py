"""Which blocks to keep: `python -m tests.benchmarks.pruning LATENTS [--seeds 0 1 2]`.

Trains a model on the latents of an artifact, cuts half of its blocks by each of four choices, fine-tunes each cut model
with the same recipe, and prints its held-out loss right after the cut and after the fine-tuning, as a Markdown table:

- learned: the most likely candidates after `train.prune`;
- lowest loss: of all choices, the one with the lowest loss right after the cut, on 16 of the training images;
- first: the first unit of each group;
- random: a random unit of each group, another one for each seed.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, set_num_threads

from edt_core.config import TrainConfig
from edt_core.data.batches import without
from edt_core.data.holdout import Holdout
from edt_core.data.latents import LatentDataset
from edt_core.diffusion import with_objective
from edt_core.models import ModelConfig, model_config
from edt_core.store.artifact import Artifact
from edt_core.training.context import LocalContext
from edt_core.training.loop import TrainState, train
from edt_core.training.prune.cut import Kept, cut_weights, most_likely, shallower
from edt_core.training.prune.gates import GatedModel
from edt_core.training.prune.groups import groups_of
from edt_core.training.prune.measure import losses_of
from edt_core.training.ranks import Ranks
from edt_core.training.start.base import Base
from edt_core.training.start.initial import initial_checkpoint
from edt_core.training.validation.measure import HeldOutLoss
from edt_core.training.validation.overfitting import HELD_OUT_LOSS

KEEP = (1, 2)
RECIPE: dict[str, Any] = {  # that of the quickstart
    "global_batch_size": 48,
    "objective": "flow",
    "timestep_sampler": "logit-normal",
    "min_snr_gamma": None,
    "optimizer": "muon",
    "lr": 4e-3,
    "lr_final": 0.0,
    "ema_decay": 0.99,
    "mirror_prob": 0.0,
    "masked_loss": False,
    "checkpoint_every": 10**9,
}


class Bench:
    """The latents, the held-out images, and the trained model."""

    def __init__(self, latents: Artifact, shape: ModelConfig, folder: Path, steps: int) -> None:
        self.shape, self.folder = shape, folder
        self.dataset = LatentDataset(latents.paths("*.arrow"))
        rows = np.sort(np.random.default_rng(0).permutation(len(self.dataset))[: len(self.dataset) // 10])
        digests = np.random.default_rng(1).integers(0, 256, (len(rows), 32)).astype(np.uint8)
        self.holdout = Holdout(rows, rows, digests)
        base = self.trained("base", TrainConfig(**RECIPE, max_steps=steps), shape)
        self.weights: Mapping[str, Tensor] = base.average()

    def trained(
        self, name: str, config: TrainConfig, shape: ModelConfig, weights: Mapping[str, Tensor] | None = None
    ) -> TrainState:
        """A training without the held-out images, from weights or from random ones."""
        dataset, start = without(self.dataset, self.holdout.rows), None
        if weights is not None:
            base = Base(shape, weights, name, tuple(map(str, range(shape.num_classes))))
            start = initial_checkpoint(config, shape, base, base.classes)[0]
        context = LocalContext(self.folder / name)
        return train(config, shape, dataset, context, None if start is None else lambda: start)

    def loss(self, shape: ModelConfig, weights: Mapping[str, Tensor]) -> float:
        """The held-out loss."""
        config = TrainConfig(**RECIPE)
        return HeldOutLoss(config, shape, self.dataset, self.holdout, Ranks()).measure(weights)[HELD_OUT_LOSS]

    def learned(self, seed: int, steps: int) -> Kept:
        """What a training of gates keeps."""
        rate = RECIPE["lr"] / 2
        config = TrainConfig(**{**RECIPE, "lr": rate, "max_steps": steps, "seed": seed, "prune": KEEP})
        state = self.trained(f"gates-{seed}", config, self.shape, self.weights)
        assert isinstance(state.aligned, GatedModel)
        return most_likely(groups_of(self.shape, KEEP), state.aligned.head.probabilities())

    def lowest(self, choices: Sequence[Kept]) -> Kept:
        """The choice with the lowest loss right after the cut."""
        cut = shallower(self.shape, KEEP)
        losses = [
            losses_of(TrainConfig(**RECIPE), self.dataset, [(cut, cut_weights(self.weights, self.shape, cut, kept))])[0]
            for kept in choices
        ]
        return choices[int(np.argmin(losses))]

    def tuned(self, kept: Kept, seed: int, steps: int) -> tuple[float, float]:
        """The held-out losses right after the cut and after the fine-tuning."""
        cut = shallower(self.shape, KEEP)
        weights = cut_weights(self.weights, self.shape, cut, kept)
        config = TrainConfig(**{**RECIPE, "lr": RECIPE["lr"] / 2, "max_steps": steps, "seed": seed})
        name = f"tuned-{seed}-" + "".join(str(unit) for units in kept for unit in units)
        return self.loss(cut, weights), self.loss(cut, self.trained(name, config, cut, weights).average())


def choices_of(shape: ModelConfig) -> list[Kept]:
    """All choices, the first of which keeps the first unit of each group."""
    groups = groups_of(shape, KEEP)
    rows = product(*(range(len(group.candidates)) for group in groups))
    return [
        most_likely(groups, [np.eye(len(group.candidates))[best] for group, best in zip(groups, row, strict=True)])
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents", help="artifact of latents, such as that of `edt run quickstart`")
    parser.add_argument("--depths", type=int, nargs=5, default=(4, 2, 2, 2, 4))
    parser.add_argument("--steps", type=int, default=400, help="of the model")
    parser.add_argument("--mask-steps", type=int, default=100)
    parser.add_argument("--train-steps", type=int, default=150, help="after the cut")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    arguments = parser.parse_args()
    set_num_threads(1)
    latents, began = Artifact.open(arguments.latents), time.process_time()
    overrides = {"depths": tuple(arguments.depths)}
    shape = model_config("EDT-Tiny/2", 32, latents.counts["classes"], overrides=overrides)
    shape = with_objective(shape, RECIPE["objective"])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(latents, shape, Path(folder), arguments.steps)
        whole, choices = bench.loss(shape, bench.weights), choices_of(shape)
        lowest = bench.lowest(choices)
        by_choice: dict[str, list[tuple[Kept, float, float]]] = {}
        for seed in arguments.seeds:
            kept = {
                "learned": bench.learned(seed, arguments.mask_steps),
                "lowest loss": lowest,
                "first": choices[0],
                "random": random.Random(seed).choice(choices),
            }
            for name, units in kept.items():
                row = (units, *bench.tuned(units, seed, arguments.train_steps))
                by_choice.setdefault(name, []).append(row)
                print(f"# seed {seed}, {name}: {units}, {row[1]:.4f} -> {row[2]:.4f}", flush=True)
    print(f"whole model: {whole:.4f}; {len(choices)} choices; {time.process_time() - began:.0f} s of processor time\n")
    print("| choice | held-out loss right after the cut | after the fine-tuning |\n|---|---|---|")
    for name, rows in by_choice.items():
        columns = [[row[column] for row in rows] for column in (1, 2)]
        print(f"| {name} | " + " | ".join(_summary(values) for values in columns) + " |")


def _summary(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


if __name__ == "__main__":
    main()

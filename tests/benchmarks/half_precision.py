"""What latents in half precision do to a model: the metric of trainings on fp32, fp16 and bf16 latents of all digits.

    python -m tests.benchmarks.half_precision [--store FOLDER] [--steps 600] [--seeds 0 1 2]

The three pipelines differ in `encode.store` alone; images, autoencoder and classifier are the same artifacts. Each seed
is trained once on each, with the same draws. Prints the stated rounding errors; mean and standard deviation over the
seeds; and of each seed the difference from its own training on fp32, which is what rounding did: the spread between
seeds is much larger. Run again, it resumes where it was. It asserts nothing.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmark.table import hardware
from tests.benchmarks.recipes import METRICS, Data, Lab, data_sets, fields_of, name_of, table

STORES = ("fp32", "fp16", "bf16")
RECIPE = "flow, logit-normal times, Muon"  # of `recipes.ROWS`: that of the quickstart


def run(store: str, steps: int, seeds: Sequence[int], lab: Lab) -> list[dict[str, float]]:
    """The metrics of a training on latents stored so, in the order of the seeds."""
    digits = data_sets("")[0]
    config = {**digits.config, "encode": {"store": store}}
    data = Data(f"half-{store}-{steps}", config, {**digits.train, "max_steps": steps})
    models = {name_of(data, RECIPE, seed): fields_of(data, RECIPE, seed) for seed in seeds}
    return [found[""] for found in lab.results(data, models).values()]


def errors(folder: Path) -> dict[str, Any]:
    """The largest rounding errors that the manifests of the latents state, by what they are stored in."""
    manifests = [json.loads(path.read_text()) for path in folder.glob("latents/*/manifest.json")]
    return {m["counts"]["store"]: m["counts"]["store_error"] for m in manifests if "store" in m["counts"]}


def error_table(found: Mapping[str, Any]) -> str:
    """The stated errors, the largest of each kind, as Markdown."""
    lines = ["| store | error of a mean | in std of its channel | error of a std | the same |", "|---" * 5 + "|"]
    for store, error in sorted(found.items()):
        cells = [f"{error[name][key]:.2g}" for name in ("mean", "std") for key in ("max", "in_std")]
        lines.append(f"| {store} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pair_table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Of each seed the difference from its training on fp32, as Markdown."""
    lines = [f"| store | {' | '.join(f'{metric}, by seed' for metric in METRICS)} |", "|---" * (1 + len(METRICS)) + "|"]
    for store in STORES[1:]:
        cells = []
        for metric in METRICS:
            pairs = zip(results[store], results[STORES[0]], strict=True)
            gaps = np.array([one[metric] - base[metric] for one, base in pairs])
            cells.append(", ".join(f"{gap:+.3g}" for gap in gaps))
        lines.append(f"| {store} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("half-precision-store"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.store.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    print(f"{hardware()}\n", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as processes:
        lab = Lab(options.store, processes)
        results = {store: run(store, options.steps, options.seeds, lab) for store in STORES}
    print(error_table(errors(options.store)), end="\n\n")
    print(table(results, STORES[0], "latents", {}), end="\n\n")
    print(pair_table(results))
    minutes = (time.monotonic() - started) / 60
    print(f"\n{len(options.seeds)} trainings a row of {options.steps} steps; {minutes:.0f} minutes")


if __name__ == "__main__":
    main()

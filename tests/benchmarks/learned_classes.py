"""A setting in which a tiny model learns the classes of small photos within minutes, found by a search on few steps.

    python -m tests.benchmarks.learned_classes --images IMAGES [--store FOLDER] [--num-classes 4]

1. Of the classes of `--images` (laid out as <class>/<image>) it takes the few that a classifier confuses least on
   held-out images, and copies those into the store.
2. It trains each setting of `SETTINGS` for few steps with a seed that no table uses, and samples it with several scales
   of guidance.

Prints both tables, and the options with which `edt paper` trains its rows by the best setting. It runs as
`tests.benchmarks.recipes` does, and resumes. It asserts nothing.
"""

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edt_core.config import ClassifierConfig
from edt_core.evaluation.extractors.classifier import classify, fit_classifier, split_holdout
from jobs.benchmark.table import hardware
from tests.benchmarks.recipes import ROWS, SEARCH_SEED, Data, Lab, data_sets, name_of

GUIDANCE = ("1.5", "3", "5")
RECIPE = ROWS["flow, logit-normal times, Muon"]  # that of the quickstart
# Of each setting the factor by which the autoencoder makes images smaller, and the fields of `train`.
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "latents of 16 x 16, epsilon, Adan": (2, {"lr": 3e-3}),
    "latents of 16 x 16, flow, Muon": (2, {**RECIPE, "lr": 3e-3}),
    "latents of 16 x 16, flow, Muon, a third of the rate": (2, {**RECIPE, "lr": 1e-3}),
    "latents of 8 x 8, epsilon, Adan": (4, {"lr": 3e-3}),
    "latents of 8 x 8, flow, Muon": (4, {**RECIPE, "lr": 3e-3}),
}


def data_of(images: Path, factor: int, steps: int) -> Data:
    """The photos of `recipes` with latents that are smaller by a factor, and a training of so many steps."""
    photos = data_sets(str(images))[1]
    autoencoder = {**photos.config["autoencoder"], "downsample_factor": factor}
    sample = {**photos.config["sample"], "num_samples": 400}
    config = {**photos.config, "autoencoder": autoencoder, "sample": sample}
    return Data(f"learned-{factor}", config, {**photos.train, "max_steps": steps})


def held_out_accuracies(images: Path, count: int) -> Iterator[tuple[float, tuple[str, ...]]]:
    """For each choice of so many classes, the accuracy on held-out images of one classifier of all classes.

    The classifier chooses among those classes only.
    """
    names = sorted(path.name for path in images.iterdir() if path.is_dir())
    files = [(path, label) for label, name in enumerate(names) for path in sorted((images / name).iterdir())]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in files])
    labels = np.array([label for _, label in files])
    config = ClassifierConfig(holdout_fraction=0.2, **data_sets(str(images))[1].config["classifier"])
    model, facts = fit_classifier(config, pixels, labels, len(names))
    print(f"{len(names)} classes: {facts['holdout_accuracy']:.3f} of {facts['holdout']} held-out images\n", flush=True)
    held_out = split_holdout(len(pixels), config.holdout_fraction, config.seed)[1]
    probabilities, truth = classify(model, pixels[held_out])[1], labels[held_out]
    for chosen in combinations(range(len(names)), count):
        rows = np.isin(truth, chosen)
        guesses = np.array(chosen)[probabilities[rows][:, chosen].argmax(1)]
        yield float((guesses == truth[rows]).mean()), tuple(names[label] for label in chosen)


def chosen_classes(images: Path, count: int, out: Path) -> Path:
    """A copy of the classes that are confused least. Prints the best choices."""
    folder = out / f"{count}-classes"
    if not folder.exists():
        ranked = sorted(held_out_accuracies(images, count), key=lambda choice: (-choice[0], choice[1]))
        print("| classes | held-out accuracy |\n|---|---|")
        for accuracy, names in ranked[:5]:
            print(f"| {', '.join(names)} | {accuracy:.3f} |")
        print(flush=True)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        for name in ranked[0][1]:
            shutil.copytree(images / name, partial / name)
        partial.rename(folder)
    return folder


def search(images: Path, steps: int, lab: Lab) -> tuple[str, str]:
    """The setting and the guidance with the highest accuracy. Prints the table of all."""
    print(f"{steps} steps of seed {SEARCH_SEED}\n")
    print("| setting | guidance | accuracy | fd_classifier |\n|---|---|---|---|")
    found: dict[tuple[str, str], float] = {}
    for factor in sorted({factor for factor, _ in SETTINGS.values()}):
        data = data_of(images, factor, steps)
        names = {name_of(data, setting, steps): setting for setting, (own, _) in SETTINGS.items() if own == factor}
        models = {name: {**SETTINGS[setting][1], "seed": SEARCH_SEED} for name, setting in names.items()}
        for name, results in lab.results(data, models, f"cfg={','.join(GUIDANCE)}").items():
            for guidance in GUIDANCE:
                metrics = results[guidance]
                found[names[name], guidance] = metrics["accuracy_classifier"]
                shown = f"{metrics['accuracy_classifier']:.3f} | {metrics['fd_classifier']:.4g}"
                print(f"| {names[name]} | {guidance} | {shown} |", flush=True)
    return max(found, key=lambda key: found[key])


def options_of(images: Path, setting: str, guidance: str) -> str:
    """The options of `edt paper` for a setting."""
    factor, fields = SETTINGS[setting]
    config = data_of(images, factor, 0).config
    sections = {name: config[name] for name in ("source", "autoencoder", "classifier")}
    values = {f"{section}.{name}": value for section, own in sections.items() for name, value in own.items()}
    values |= {f"train.{name}": value for name, value in fields.items()}
    values |= {"train.mirror_prob": 0.5, "sample.cfg_scale": guidance}  # of photos both sides are right
    return " ".join(f"--set {name}={value}" for name, value in values.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="labelled images of one size, a folder a class")
    parser.add_argument("--num-classes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300, help="of each training of the search")
    parser.add_argument("--store", type=Path, default=Path("learned-store"))
    options = parser.parse_args()
    options.store.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    print(f"{hardware()}\n", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    images = chosen_classes(options.images, options.num_classes, options.store)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as processes:
        best = search(images, options.steps, Lab(options.store, processes))
    print(f"\nbest: {', guidance '.join(best)}\nedt paper 4 {options_of(images, *best)}")
    print(f"{(time.monotonic() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()

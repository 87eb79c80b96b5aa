"""Which recipe trains better: objectives, timesteps, alignment, optimizers and averages, three trainings a row.

    python -m tests.benchmarks.recipes --cifar IMAGES [--store FOLDER] [--plot docs/recipes.png]

Trains each row of `ROWS` with each seed, on all digits and on the images of `--cifar` (laid out as <class>/<image>), by
the steps of the ordinary workflow, and measures every training by one protocol. Prints, for each data set, mean and
standard deviation over the trainings of a row, and whether it differs from the first row by more than chance. The steps
run without Ray, in as many processes as there are processors, each with one thread: Ray's processes take longer than
these small models. Run again, it resumes where it was. It asserts nothing.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from edt_core.config import Section
from edt_core.evaluation.trainings import SIGNIFICANT, p_values
from edt_core.progress import Silent
from edt_core.store.artifact import Artifact, Source
from edt_core.store.store import Store
from jobs.benchmark.table import hardware
from jobs.commands import evaluate_model
from jobs.stages.stage import Stage
from pipelines.config.schema import load_config
from pipelines.engine.step import StepFuture
from pipelines.pipeline import call_steps, prepare_source
from pipelines.terminal.terminal import Terminal
from tests.support.local_ray import local_ray_train

BASE = "epsilon, Adan"
METRICS = {"fd_classifier": "lower is better", "accuracy_classifier": "higher is better"}
FLOW = {"objective": "flow"}
# Of each row, the fields that differ from the first.
ROWS: dict[str, dict[str, Any]] = {
    BASE: {"ema_widths": [0.05, 0.1]},
    "uniform timesteps": {"timestep_sampler": "uniform"},
    "logit-normal timesteps": {"timestep_sampler": "logit-normal"},
    "v": {"objective": "v_prediction"},
    "flow, uniform times": FLOW,
    "flow, logit-normal times": {**FLOW, "timestep_sampler": "logit-normal"},
    "aligned with the latents": {"align": "autoencoder"},
    "aligned with its average": {"align": "self"},
    "AdamW": {"optimizer": "adamw"},
    "Muon": {"optimizer": "muon"},
    "flow, logit-normal times, Muon": {**FLOW, "timestep_sampler": "logit-normal", "optimizer": "muon"},
}
SEARCHED = ("AdamW", "Muon")  # their learning rate is chosen by one training each, of a seed that is not measured
RATES, SEARCH_SEED = (0.25, 0.5, 1.0), 100  # times that of the first row
WIDTHS = ("off", "0.03", "0.05", "0.1", "0.15", "0.2")


@dataclass(frozen=True)
class Data:
    """A data set, the configuration of its pipeline, and its model's training."""

    name: str
    config: Mapping[str, Any]
    train: Mapping[str, Any]


def data_sets(cifar: str) -> list[Data]:
    """Both data sets. Latents of 4 x 8 x 8 and 4 x 16 x 16; the chain has 25 steps in both."""
    chain = {"num_sampling_steps": 25}
    common = {"global_batch_size": 48, "lr_final": 0.0, "ema_decay": 0.99, "checkpoint_every": 10_000}
    digits = Data(
        "digits",
        {
            "source": {"kind": "digits"},
            "autoencoder": {"downsample_factor": 4, "base_channels": 8, "steps": 160, "lr": 1e-2},
            "classifier": {"steps": 300},
            "sample": {**chain, "num_samples": 400, "cfg_scale": 1.75},
        },
        {**common, "model": "EDT-Tiny/2", "max_steps": 600, "lr": 4e-3, "mirror_prob": 0.0},
    )
    photos = Data(
        "cifar",
        {
            "source": {"kind": "image_folder", "path": cifar},
            "autoencoder": {"downsample_factor": 2, "base_channels": 8, "steps": 400, "lr": 5e-3},
            "classifier": {"steps": 800},
            "sample": {**chain, "num_samples": 500, "cfg_scale": 1.5},
        },
        {**common, "model": "EDT-Tiny/2", "masked_loss": False, "max_steps": 500, "lr": 3e-3},
    )
    return [digits, photos]


def name_of(data: Data, row: str, seed: int, rate: float = 1.0) -> str:
    """The registered name of a training."""
    words = "".join(letter if letter.isalnum() else "-" for letter in f"{row} {rate:g}" if letter != ",")
    return f"{data.name}-{words.lower()}-{seed}"


def fields_of(data: Data, row: str, seed: int, rate: float = 1.0) -> dict[str, Any]:
    """The fields of `train` of one training, beside those of the data set."""
    return {**ROWS[row], "seed": seed, **({} if rate == 1.0 else {"lr": data.train["lr"] * rate})}


@dataclass
class Here:
    """Makes each step in this process, unless the store has its artifact."""

    store: Store

    def step(self, name: str, stage: Stage, config: Section, **inputs: StepFuture | Source) -> StepFuture:
        given = {role: item.result() if isinstance(item, StepFuture) else item for role, item in inputs.items()}
        identity = stage.fingerprint(config, {role: item.fingerprint for role, item in given.items()})
        with self.store.lock(stage.kind, identity):
            artifact = self.store.find(stage.kind, identity)
            if artifact is None:
                artifact = stage.execute(config, given, self.store.writer(stage.kind, identity), Silent())
        return StepFuture(name, stage.kind, identity, artifact=artifact)

    def adopt(self, name: str, stage: Stage, item: Artifact | Source, origin: str) -> StepFuture:
        raise NotImplementedError

    def promote(self, promotion: Any) -> None:
        raise NotImplementedError


def trained(store: Path, sweep: str, path: Path) -> dict[str, dict[str, float]]:
    """The metrics of the only model of a pipeline; with a sweep such as "cfg=1.5,3", also by each of its values."""
    config = load_config(str(path), [], str(store))
    opened = Store.open(str(store))
    with local_ray_train(), Terminal(to_stderr=True) as terminal:
        (branch,) = call_steps(Here(opened), config, prepare_source(config.source, opened.root, terminal))
        made = {role: step.result() for role, step in branch.steps.items()}
        found = {"": dict(made["evaluation"].counts["metrics"])}
        if sweep:
            found |= swept(made, config.sample.model_dump(), sweep, store / "swept" / branch.name)
    return found


def swept(made: Mapping[str, Artifact], chain: Mapping[str, Any], sweep: str, out: Path) -> dict[str, dict[str, float]]:
    """The metrics of a training with other settings of its samples, by the value of the setting."""
    fields = ("num_samples", "num_sampling_steps", "cfg_scale")
    flags = [part for name in fields for part in (f"--{name.replace('_', '-')}", str(chain[name]))]
    networks = [part for role in ("classifier", "reference") for part in (f"--{role}", made[role].folder.uri)]
    arguments = [made["checkpoint"].folder.uri, str(out), *networks, *flags, "--sweep", sweep]
    evaluate_model.run(evaluate_model.make_parser("edt evaluate").parse_args(arguments), Silent())
    results = json.loads((out / "results.json").read_text())
    return {value: result["metrics"] for result in results for value in result["settings"].values()}


def write_pipeline(data: Data, name: str, fields: Mapping[str, Any], folder: Path) -> Path:
    """The pipeline of one training as a file. The chain of flow matching has another sampler."""
    flow = FLOW if FLOW.items() <= fields.items() else {}
    config = {
        "name": f"recipes-{data.name}",
        "preprocess": {"image_size": 32},
        **data.config,
        "train": {**data.train, **flow},
        "models": {name: dict(fields)},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


@dataclass(frozen=True)
class Lab:
    """A store, and the processes that train into it."""

    store: Path
    processes: ProcessPoolExecutor

    def results(
        self, data: Data, models: Mapping[str, Mapping[str, Any]], sweep: str = ""
    ) -> dict[str, dict[str, dict[str, float]]]:
        """What `trained` finds of each model, by name. The first one makes what all share."""
        paths = [write_pipeline(data, name, fields, self.store) for name, fields in models.items()]
        work = partial(trained, self.store, sweep)
        first = self.processes.submit(work, paths[0]).result()
        return dict(zip(models, [first, *self.processes.map(work, paths[1:])], strict=True))


def chosen_rates(data: Data, lab: Lab) -> dict[str, float]:
    """For each row whose learning rate is searched, the one of least distance, times that of the first row."""
    names = {(row, rate): name_of(data, row, SEARCH_SEED, rate) for row in SEARCHED for rate in RATES}
    found = lab.results(data, {name: fields_of(data, row, SEARCH_SEED, rate) for (row, rate), name in names.items()})
    distance = {key: found[name][""]["fd_classifier"] for key, name in names.items()}
    return {row: min(RATES, key=lambda rate: distance[row, rate]) for row in SEARCHED}


def measured(
    data: Data, seeds: Sequence[int], rates: Mapping[str, float], lab: Lab
) -> dict[str, list[dict[str, float]]]:
    """The metrics of each training, by row in the order of the seeds."""
    names = {(row, seed): name_of(data, row, seed, rates.get(row, 1.0)) for row in ROWS for seed in seeds}
    found = lab.results(
        data, {name: fields_of(data, row, seed, rates.get(row, 1.0)) for (row, seed), name in names.items()}
    )
    return {row: [found[names[row, seed]][""] for seed in seeds] for row in ROWS}


def of_widths(data: Data, seeds: Sequence[int], lab: Lab) -> dict[str, list[dict[str, float]]]:
    """The metrics of the first row's trainings with averages of other widths, by width in the order of the seeds."""
    models = {name_of(data, BASE, seed): fields_of(data, BASE, seed) for seed in seeds}
    found = lab.results(data, models, f"ema={','.join(WIDTHS)}").values()
    return {width: [each[width] for each in found] for width in WIDTHS}


def verdicts(rows: Mapping[str, Sequence[float]], base: str) -> dict[str, str]:
    """For each row but the first, the probability of such a difference by chance, and whether that is enough."""
    return {
        row: f"{'**differs**' if chance < SIGNIFICANT else 'not shown to differ'} (p-value {chance:.2g})"
        for row, chance in p_values(rows, base).items()
    }


def table(results: Mapping[str, Sequence[Mapping[str, float]]], base: str, first: str, extra: Mapping[str, str]) -> str:
    """Mean and standard deviation over the trainings of each row, as Markdown."""
    lines = [
        f"| {first} | {' | '.join(METRICS)} | fd_classifier against the first row |",
        "|---" * (2 + len(METRICS)) + "|",
    ]
    verdict = verdicts({row: [one["fd_classifier"] for one in ones] for row, ones in results.items()}, base)
    for row, ones in results.items():
        cells = [f"{row}{extra.get(row, '')}"]
        for metric in METRICS:
            values = np.array([one[metric] for one in ones])
            cells.append(f"{values.mean():.4g} ± {values.std(ddof=1):.2g}")
        lines.append(f"| {' | '.join([*cells, verdict.get(row, '')])} |")
    return "\n".join(lines)


def plot(by_data: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]], path: str) -> None:
    """A panel for each data set: the distance of each training, a line a row, and the mean of the first as a rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.5 + 0.32 * len(ROWS)), layout="constrained")
    axes = figure.subplots(1, len(by_data), sharey=True, squeeze=False)[0]
    for axis, (name, results) in zip(axes, by_data.items(), strict=True):
        for place, (row, ones) in enumerate(results.items()):
            values = [one["fd_classifier"] for one in ones]
            axis.plot(values, [place] * len(values), "o", color="#b35000" if row == BASE else "#0b62c4", alpha=0.8)
        axis.axvline(np.mean([one["fd_classifier"] for one in results[BASE]]), color="#57606a", linewidth=0.8)
        axis.set_yticks(range(len(results)), list(results))
        axis.set_title(f"{name}: fd_classifier of each training, lower is better", fontsize=9)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=130)


def sections(data: Data, seeds: Sequence[int], lab: Lab, found: dict[str, Any]) -> Iterator[str]:
    """The tables of a data set, as Markdown; the results of its rows are put into `found`."""
    rates = chosen_rates(data, lab)
    found[data.name] = results = measured(data, seeds, rates, lab)
    shown = {row: f" (lr {data.train['lr'] * rate:g})" for row, rate in rates.items()}
    yield f"## {data.name}\n{len(seeds)} trainings a row, lr {data.train['lr']:g} except where it is stated.\n"
    yield table(results, BASE, "recipe", shown) + "\n"
    yield table(of_widths(data, seeds, lab), "off", f"width of the average ({BASE})", {"off": " (EMA 0.99)"}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", help="labelled images of 32 px, a folder a class; without them, only the digits")
    parser.add_argument("--store", type=Path, default=Path("recipes-store"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--plot", default="recipes.png")
    options = parser.parse_args()
    options.store.mkdir(parents=True, exist_ok=True)
    started, found = time.monotonic(), dict[str, Any]()
    print(f"{hardware()}\n", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as processes:
        lab = Lab(options.store, processes)
        for data in data_sets(options.cifar or "")[: 2 if options.cifar else 1]:
            for section in sections(data, options.seeds, lab, found):
                print(section, flush=True)
    plot(found, options.plot)
    print(f"{(time.monotonic() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()

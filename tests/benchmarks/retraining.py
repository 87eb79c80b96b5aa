"""What a retraining costs and gives: `python tests/benchmarks/retraining.py WORK [images] [classes] [difffit]`.

images: digits without 100 of them, then all 1,797: `edt retrain` against the base run and against a training from
random weights with the same networks and reference, so that both have one protocol.
classes: digits 0 to 7, then 8 and 9 too: accuracy after 400 steps from the champion and from random weights, and after
all 1,200 from random weights.
difffit: as images, with `train.trainable=difffit` and `bias`.

Each seed has a store in WORK, with the finished rows beside it: a rerun measures only what is missing. Prints Markdown
tables.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from edt_core.data.digits import write_digits

NAME = "edt-tiny-digits-32"
ARRIVING = 100
SHORT = 400  # a third of the quickstart's steps
SCRATCH = ("train.init_from=null", "train.max_steps=500", "train.warmup_steps=0", "train.lr=4.0e-3")  # quickstart's
METRICS = ("fd_classifier", "accuracy_classifier")


def edt(*arguments: str, sets: Sequence[str] = ()) -> dict[str, Any]:
    """`edt ... --json` in a process: its answer, with its wall time in `wall_s`."""
    options = [part for text in sets for part in ("--set", text)]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments, *options, "--json"], stdout=subprocess.PIPE, check=True
    )
    return {**json.loads(done.stdout), "wall_s": time.perf_counter() - began}


class Line:
    """A folder of digits that grows, and a store in which a model is trained on it again and again."""

    def __init__(self, work: Path, name: str, seed: int, keep: Callable[[int, Path], bool]) -> None:
        self.root, self.folder, self.seed = work / name, work / name / "images", seed
        self.digits = sorted(write_digits(work / "digits").glob("*/*.png"))
        self.later = [path for number, path in enumerate(self.digits) if not keep(number, path)]
        shutil.rmtree(self.folder, ignore_errors=True)  # of a process that was ended: the later images may be there
        self._link(set(self.digits) - set(self.later))
        self.record = self.root / "rows.json"
        self.rows: dict[str, dict[str, float]] = json.loads(self.record.read_text()) if self.record.exists() else {}
        self.shown: dict[str, dict[str, float]] = {}  # rows of this process, in order

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row, unless an earlier process did."""
        if name not in self.rows:
            self.rows[name] = values(measure())
            self.record.write_text(json.dumps(self.rows))
        self.shown[name] = self.rows[name]

    def _link(self, paths: Sequence[Path] | set[Path]) -> None:
        for path in paths:
            target = self.folder / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.hardlink_to(path)

    def base(self) -> dict[str, Any]:
        source = ["source.kind=image_folder", f"source.path={self.folder}"]
        seeds = [f"train.seed={self.seed}", f"sample.seed={self.seed}"]
        return edt("run", "quickstart", "--store", str(self.root / "store"), sets=[*source, *seeds])

    def arrive(self) -> None:
        self._link(self.later)

    def retrain(self, *sets: str) -> dict[str, Any]:
        return edt("retrain", NAME, "--store", str(self.root / "store"), sets=sets)


def values(outcome: dict[str, Any]) -> dict[str, float]:
    metrics = outcome["models"][NAME]["metrics"]
    return {"wall_s": outcome["wall_s"], **{name: metrics[name] for name in METRICS}}


def images(work: Path, seed: int, *variants: tuple[str, tuple[str, ...]]) -> dict[str, dict[str, float]]:
    """Rows of one seed: the base run, the retraining, a training from random weights, and other variants."""
    line = Line(work, f"images-{seed}", seed, lambda number, path: (number + seed) % 17 or number > 17 * ARRIVING)
    line.row("base run, 1,697 images", line.base)
    line.arrive()
    line.row("edt retrain, 300 steps", lambda: line.retrain("train.max_steps=300"))
    line.row("from random weights, 1,200 steps", lambda: line.retrain(*SCRATCH))
    for name, sets in variants:
        line.row(name, partial(line.retrain, *sets))
    return line.shown


def difffit(work: Path, seed: int) -> dict[str, dict[str, float]]:
    ten_times = ("train.init_from=models:/" + NAME + "/1", "train.max_steps=300", "train.lr=4.0e-2")
    variants = [
        (f"trainable={kind}, 300 steps", (*ten_times, f"train.trainable={kind}")) for kind in ("difffit", "bias")
    ]
    return images(work, seed, *variants)


def classes(work: Path, seed: int) -> dict[str, dict[str, float]]:
    line = Line(work, f"classes-{seed}", seed, lambda number, path: path.parent.name not in ("8", "9"))
    line.row("base run, digits 0 to 7", line.base)
    line.arrive()
    line.row(f"edt retrain, {SHORT} steps", lambda: line.retrain(f"train.max_steps={SHORT}"))
    line.row(f"from random weights, {SHORT} steps", lambda: line.retrain(*SCRATCH, f"train.max_steps={SHORT}"))
    line.row("from random weights, 1,200 steps", lambda: line.retrain(*SCRATCH))
    return line.shown


def table(part: str, results: Sequence[dict[str, dict[str, float]]]) -> str:
    """Mean and standard deviation over the seeds."""
    lines = [f"| {part}, {len(results)} seeds | seconds | {' | '.join(METRICS)} |", "|---|---|---|---|"]
    for row in results[0]:
        cells = [[result[row][column] for result in results] for column in ("wall_s", *METRICS)]
        shown = [f"{mean(cell):.4g}" + (f" ± {stdev(cell):.2g}" if len(cell) > 1 else "") for cell in cells]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("parts", nargs="*", default=["images"], choices=["images", "classes", "difffit"])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    measure = {"images": images, "classes": classes, "difffit": difffit}
    for part in arguments.parts:
        results = []
        for seed in range(arguments.seeds):
            results.append(measure[part](arguments.work.absolute(), seed))
            print(json.dumps({"part": part, "seed": seed, **results[-1]}), file=sys.stderr)
        print(table(part, results))


if __name__ == "__main__":
    main()

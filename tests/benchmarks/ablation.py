"""A small comparison: EDT with and without masking, DiT and MDTv2 at equal MACs, one training each; AMM on each.

    python tests/benchmarks/ablation.py IMAGES [--store FOLDER] [--plot docs/ablation.png]

Trains what `pipelines/configs/ablation.yaml` says on labelled images (`edt run`), searches each model for a
placement of AMM (`edt amm-search`), and prints both as Markdown tables. Run again, it goes on where it was. It asserts
nothing.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from edt_core.environment import code_version
from edt_core.store.artifact import Artifact
from jobs.benchmark.table import hardware

EDT = [sys.executable, "-m", "pipelines.cli"]
MODELS = {"edt": "EDT", "edt-without-masking": "EDT without masking", "dit": "DiT", "mdtv2": "MDTv2"}
METRICS = ("fd_classifier", "kid_classifier", "precision_classifier", "recall_classifier", "accuracy_classifier")
# Each placement of the search: 3 x 250 samples, as the models were measured but with fewer steps.
SEARCH = ("--metric", "fd_classifier", "--num-samples", "250", "--repeats", "3", "--top", "2", "--sampler", "ddim")
SEARCH += ("--num-sampling-steps", "15", "--cfg-scale", "1.5", "--num-workers", "2")


def edt(*arguments: str) -> str:
    """Standard output of a command. Its standard error is passed on; raises CalledProcessError where it fails."""
    return subprocess.run([*EDT, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def artifacts_of(model: str, store: Path) -> dict[str, str]:
    """Where the artifacts lie that a model was made from and measured with, by kind."""
    nodes = json.loads(edt("lineage", model, "--store", str(store), "--json"))["nodes"]
    return {node["kind"]: node["uri"] for node in nodes.values()}


def searched(name: str, store: Path) -> dict[str, Any]:
    """What a search for a placement of AMM has found."""
    made = artifacts_of(f"{name}@candidate", store)
    out = store / "amm" / name
    edt("amm-search", made["checkpoint"], str(out), "--classifier", made["classifier"], *SEARCH)
    found: dict[str, Any] = Artifact.open(str(out)).read_json("results.json")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="labelled images, a folder a class")
    parser.add_argument("--store", type=Path, default=Path("edt-store"))
    parser.add_argument("--plot", default="ablation.png", help="figure of `edt compare`")
    options = parser.parse_args()
    edt("run", "ablation", "--set", f"source.path={options.images}", "--store", str(options.store))
    versions = [f"{name}@candidate" for name in MODELS]
    compared = ("compare", *versions, "--store", str(options.store), "--metric", METRICS[0])
    points = json.loads(edt(*compared, "--out", options.plot, "--json"))["points"]
    print(f"{hardware()}; configuration ablation, commit {code_version()[:12]}\n")
    print(trained(points, options.store))
    print()
    print(modulated({name: searched(name, options.store) for name in MODELS}))


def trained(points: list[dict[str, Any]], store: Path) -> str:
    """The models, what they cost and what they reached."""
    lines = ["| model | parameters | MACs | training FLOPs | minutes x workers | " + " | ".join(METRICS) + " |"]
    lines.append("|---" * (5 + len(METRICS)) + "|")
    for name, point in zip(MODELS.values(), points, strict=True):
        metrics = json.loads(edt("models", "show", point["label"], "--store", str(store), "--json"))["metrics"]
        cost = Artifact.open(artifacts_of(point["label"], store)["checkpoint"]).counts
        cells = [name, f"{cost['parameters'] / 1e6:.2f} M", f"{cost['macs'] / 1e6:.1f} M"]
        cells += [f"{point['training_flops']:.2e}", f"{60 * point['device_hours']:.1f}"]
        cells += [f"{metrics[metric]:.4g} ± {metrics[f'{metric}_std']:.2g}" for metric in METRICS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def modulated(found: dict[str, dict[str, Any]]) -> str:
    """What the best placement of each search came to on seeds by which nothing was chosen."""
    lines = ["| model | best placement | without AMM | with AMM | chosen |", "|---|---|---|---|---|"]
    for name, result in found.items():
        confirmed = [trial for trial in result["trials"] if trial["stage"] == "confirm"]
        best = confirmed[-1]["placement"] if confirmed else "none is better than off"
        values = [f"{trial['value']:.4g}" for trial in confirmed] or ["", ""]
        chosen = "+".join(map(str, result["amm_blocks"])) or "off"
        lines.append(f"| {MODELS[name]} | {best} | {' | '.join(values)} | {chosen} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

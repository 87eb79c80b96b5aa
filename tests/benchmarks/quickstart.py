"""Times the promises of the quickstart: `edt --help`, a first `edt run`, and a second one that reuses everything.

    python tests/benchmarks/quickstart.py [--out results.json] [--store FOLDER]

Prints a table with hardware and commit. It measures and asserts nothing.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edt_core.environment import code_version

EDT = [sys.executable, "-m", "pipelines.cli"]


def timed(*arguments: str) -> tuple[float, str]:
    """Seconds and standard output of one command. Raises CalledProcessError where it fails."""
    started = time.perf_counter()
    done = subprocess.run([*EDT, *arguments], check=True, capture_output=True, text=True)
    return time.perf_counter() - started, done.stdout


def measure(store: str) -> dict[str, object]:
    """Figures by name."""
    helps = sorted(timed("--help")[0] for _ in range(5))
    first, output = timed("run", "--store", store)
    second, again = timed("run", "--store", store)
    metrics = dict(re.findall(r"^  (\w+) +([-\d.e+]+)   untrained", output, re.MULTILINE))
    untrained = dict(re.findall(r"^  (\w+) +[-\d.e+]+   untrained ([-\d.e+]+)", output, re.MULTILINE))
    summary = re.search(r"\d+ steps reused, \d+ run, \d+ failed", again)
    return {
        "edt --help, median of 5 [s]": round(helps[2], 2),
        "edt run, first [s]": round(first, 1),
        "edt run, second [s]": round(second, 1),
        "second run": summary[0] if summary else "?",
        "largest process of the runs [MB]": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        **{f"{name}": f"{value} (untrained {untrained[name]})" for name, value in metrics.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--store", help="a new store to use and keep  [default: a temporary one]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(options.store or scratch)
    figures |= {"cores": os.cpu_count(), "commit": code_version()}
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        print(f"{name:<{width}}  {value}")
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

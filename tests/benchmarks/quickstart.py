"""Times the promises of the quickstart: imports, `edt --help`, a first `edt run`, and a second that reuses everything.

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

EDT = ("-m", "pipelines.cli")
IMPORTS = ("import edt_core", "import edt_core.models", "from edt_core import EDTPipeline")


def timed(*arguments: str) -> tuple[float, str]:
    """Seconds and standard output of one Python process. Raises CalledProcessError where it fails."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return time.perf_counter() - started, done.stdout


def median_of_5(*arguments: str) -> float:
    """Seconds of a Python process from its start to its end."""
    return round(sorted(timed(*arguments)[0] for _ in range(5))[2], 2)


def measure(store: str) -> dict[str, object]:
    """Figures by name."""
    imports = {f"{statement}, median of 5 [s]": median_of_5("-c", statement) for statement in IMPORTS}
    helps = median_of_5(*EDT, "--help")
    first, output = timed(*EDT, "run", "--store", store)
    second, again = timed(*EDT, "run", "--store", store)
    metrics = dict(re.findall(r"^  (\w+) +([-\d.e+]+)   untrained", output, re.MULTILINE))
    untrained = dict(re.findall(r"^  (\w+) +[-\d.e+]+   untrained ([-\d.e+]+)", output, re.MULTILINE))
    summary = re.search(r"\d+ steps reused, \d+ run, \d+ failed", again)
    return {
        **imports,
        "edt --help, median of 5 [s]": helps,
        "edt run, first [s]": round(first, 1),
        "edt run, second [s]": round(second, 1),
        "second run": summary[0] if summary else "?",
        # The peak of a child starts at that of its parent, so this holds as long as this process itself is small.
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

"""What very many images cost the driver: `python -m tests.benchmarks.planning WORK [MILLIONS ...]`, in WORK, a folder.

For each number (default 1, 5, 14 and 20 million) a process of its own lists that many files in 1,000 class folders and
writes the plan of their shards; then a second one does what `edt plan` does with a source whose digests are known:
listing, digests from the cache, identity. The files are synthetic: names, sizes and times as a disk would give them,
and none of them exists, so the time of the disk is not in it (`edt bench data` has that of 1.3 million real files). The
memory is the process's own peak, less what was resident before: growth per million is from one number to the next.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edt_core.child_process import child_environment, python_command
from edt_core.config import PreprocessConfig, SourceConfig
from edt_core.memory import peak_bytes, reset_peak, resident_bytes
from edt_core.store.folder import Folder
from jobs.benchmark.planning import make_classes, synthetic_files

MILLION = 1_000_000


def measure(root: Path, with_digests: bool) -> dict[str, float]:
    """Seconds by the clock and of the processor, and bytes before and at the peak, of a plan in this process."""
    from edt_core.data.sources import Listing, list_source, listing_identity, source_digests
    from jobs.stages.preprocess import plan_shards
    from jobs.stages.reuse.plan_file import write_plans

    def digests(listing: Listing, _: Any) -> Iterator[bytes]:
        return (hashlib.sha256(b"%d" % k).digest() for k in range(len(listing)))

    Listing.convert = digests  # type: ignore[assignment,method-assign]

    def listed() -> Listing:
        return list_source(SourceConfig(kind="image_folder", path=str(root)))

    if with_digests:
        source_digests(listed())  # they are known from here on
    reset_peak()
    before, started, processor = resident_bytes(), time.perf_counter(), time.process_time()
    listing = listed()
    if with_digests:
        listing_identity(listing, source_digests(listing))
    else:
        with tempfile.TemporaryDirectory(dir=root.parent) as folder:
            write_plans(plan_shards(listing, PreprocessConfig()), Folder.at(folder))
    seconds = {"seconds": time.perf_counter() - started, "processor_s": time.process_time() - processor}
    return {**seconds, "before": before, "peak": peak_bytes()}


def main(work: str, *millions: str) -> None:
    """Print the table."""
    from jobs.benchmark.table import hardware, mib

    root = Path(work).absolute() / "images"
    make_classes(root)
    print(hardware())
    print("| what | million | clock | processor | before | peak | growth a million |\n|---|---|---|---|---|---|---|")
    for what, with_digests in (("listing and plan", False), ("listing, known digests, identity", True)):
        last: tuple[float, float] | None = None
        for number in map(float, millions or ("1", "5", "14", "20")):
            with tempfile.TemporaryDirectory(dir=work) as cache:
                arguments = ("--child", str(root), str(int(number * MILLION)), str(int(with_digests)))
                command = python_command("-m", "tests.benchmarks.planning", *arguments)
                environment = child_environment(EDT_CACHE_DIR=cache, PYTHONPATH=os.getcwd())
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
            row = json.loads(done.stdout)
            growth = "" if last is None else mib(int((row["peak"] - last[1]) / (number - last[0])))
            last = number, row["peak"]
            times = f"{row['seconds']:.1f} s | {row['processor_s']:.1f} s"
            print(
                f"| {what} | {number:g} | {times} | {mib(row['before'])} | {mib(row['peak'])} | {growth} |", flush=True
            )


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        with synthetic_files(int(sys.argv[3])):
            print(json.dumps(measure(Path(sys.argv[2]), sys.argv[4] == "1")))
    else:
        main(*sys.argv[1:])

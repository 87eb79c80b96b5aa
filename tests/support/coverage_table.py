"""`python -m tests.support.coverage_table`: a table of the coverage that .coverage holds, by package."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any


@dataclass
class Covered:
    """Sums over the files of a package; a branch is a pair of lines between which the program may go."""

    statements: int = 0
    statements_run: int = 0
    branches: int = 0
    branches_run: int = 0

    def add(self, summary: Mapping[str, Any]) -> None:
        self.statements += summary["num_statements"]
        self.statements_run += summary["covered_lines"]
        self.branches += summary["num_branches"]
        self.branches_run += summary["covered_branches"]

    @property
    def percent(self) -> float:
        """Statements and branches that ran, of all, as coverage counts them; 100 if there are none."""
        total = self.statements + self.branches
        return 100 * (self.statements_run + self.branches_run) / total if total else 100.0


def by_package(files: Mapping[str, Any]) -> dict[str, Covered]:
    """Sums for each package and each package directly in it, in order, and for all; of coverage's files by path."""
    sums: dict[str, Covered] = defaultdict(Covered)
    for name, file in files.items():
        folders = PurePath(name).parts[:-1]
        for package in {"/".join(folders[:depth]) for depth in (1, 2)}:
            sums[package].add(file["summary"])
        sums["all"].add(file["summary"])
    return {name: sums[name] for name in (*sorted(sums.keys() - {"all"}), "all") if name in sums}


def lines(sums: Mapping[str, Covered]) -> Iterator[str]:
    """The table."""
    yield f"{'package':28} {'statements':>11} {'not run':>8} {'branches':>9} {'not run':>8} {'%':>6}"
    for name, covered in sums.items():
        missed = covered.statements - covered.statements_run, covered.branches - covered.branches_run
        shown = f"{covered.statements:11d} {missed[0]:8d} {covered.branches:9d} {missed[1]:8d}"
        yield f"{name:28} {shown} {covered.percent:6.2f}"


def main() -> None:
    import coverage

    collected = coverage.Coverage()
    collected.load()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        collected.json_report(outfile=str(report))
        files = json.loads(report.read_text())["files"]
    print(*lines(by_package(files)), sep="\n")


if __name__ == "__main__":
    main()

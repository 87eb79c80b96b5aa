"""The house of the product: rooms on floors, no circles, small folders. See tests/support/house.py."""

import statistics
from pathlib import Path

import pytest

from tests.support import house
from tests.support.coverage_table import by_package, lines

MODULES = house.modules()


def test_no_import_runs_up_the_floors() -> None:
    assert not house.backwards(MODULES)


def test_no_import_is_hidden_in_a_function_for_a_circle() -> None:
    assert not house.hidden_for_a_circle(MODULES)


def test_folders_can_be_overlooked() -> None:
    assert max(number for number, _ in house.folders(MODULES).values()) <= 15
    assert len(house.FLOORS["pipelines"]) <= 8


def test_functions_are_small() -> None:
    lengths = house.function_lengths(MODULES)
    assert statistics.median(lengths) <= 8
    assert lengths[len(lengths) * 9 // 10] <= 20


def test_whatever_is_public_says_what_it_is() -> None:
    assert not [f"{module.name}.{name}" for module in MODULES for name in module.without_docstring()]


def test_an_import_upwards_and_a_hidden_circle_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "edt_core/store/folder.py": "def f():\n    from edt_core.store import cache\n    return cache\n",
        "edt_core/store/cache.py": "from edt_core.store import folder\n",
        "edt_core/models/zoo.py": "import edt_core.training.loop\n",
        "edt_core/training/loop.py": "class Loop:\n    pass\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(house, "ROOT", tmp_path)
    planted = house.modules()
    assert house.backwards(planted) == ["edt_core.models.zoo -> edt_core.training.loop"]
    assert house.hidden_for_a_circle(planted) == ["edt_core.store.folder -> edt_core.store.cache"]
    assert [module.without_docstring() for module in planted if module.room == "training"] == [["Loop"]]


def test_coverage_is_summed_by_package() -> None:
    """A file counts for its package and for the package around it; a file of no statements counts as covered."""

    def file(*counts: int) -> dict[str, dict[str, int]]:
        names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
        return {"summary": dict(zip(names, counts, strict=True))}

    files = {
        "edt_core/config.py": file(10, 5, 2, 1),
        "edt_core/models/families/edt.py": file(20, 20, 6, 3),
        "jobs/__init__.py": file(0, 0, 0, 0),
    }
    sums = by_package(files)
    assert {name: (covered.statements, covered.branches_run) for name, covered in sums.items()} == {
        "edt_core": (30, 4),
        "edt_core/models": (20, 3),
        "jobs": (0, 0),
        "all": (30, 4),
    }
    table = list(lines(sums))
    assert table[1].split() == ["edt_core", "30", "5", "8", "4", "76.32"]
    assert table[3].split()[-1] == "100.00"

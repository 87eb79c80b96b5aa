"""The arrows of the architecture: pipelines -> jobs -> edt_core, and what must import on a bare GPU machine."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "edt_core": {"jobs", "pipelines", "infra", "tests", "ray", "mlflow"},
    "jobs": {"pipelines", "infra", "tests"},
    "pipelines": {"infra", "tests"},
}
MODULES = [(package, path) for package in FORBIDDEN for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(path: Path) -> Iterator[str]:
    """Top-level names of every import statement in a file, at any depth of it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


def test_there_is_something_to_check() -> None:
    assert {package for package, _ in MODULES} == set(FORBIDDEN)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_import_runs_backwards(package: str) -> None:
    backwards = {
        str(path.relative_to(ROOT)): found
        for owner, path in MODULES
        if owner == package and (found := FORBIDDEN[package] & set(imported_packages(path)))
    }
    assert not backwards


def test_the_walk_finds_a_forbidden_import(tmp_path: Path) -> None:
    sneaky = tmp_path / "sneaky.py"
    sneaky.write_text("def f():\n    from ray.train import report\n    return report\n")
    assert FORBIDDEN["edt_core"] & set(imported_packages(sneaky))


@pytest.mark.extern
def test_the_acceptance_imports_with_torch_numpy_pyarrow_safetensors_and_filelock_alone() -> None:
    """What a bare GPU machine has, with what these need. The other packages are as if they were not installed."""
    code = """
import importlib, pathlib, sys

class Bare:
    absent = {'ray', 'mlflow', 'diffusers', 'pydantic', 'PIL', 'yaml', 'rich', 'pytorch_optimizer', 'webdataset',
              'sklearn', 'psutil', 'transformers', 'huggingface_hub', 'pandas', 'scipy', 'typer', 'timm', 'einops'}
    finders = list(sys.meta_path)

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split('.')[0] in cls.absent:
            return None
        return next((spec for finder in cls.finders if (spec := finder.find_spec(name, path, target))), None)

sys.meta_path[:] = [Bare]
for path in sorted(pathlib.Path('edt_core/acceptance').glob('[a-z]*.py')):
    importlib.import_module(f'edt_core.acceptance.{path.stem}')
import torch
from edt_core.acceptance.options import training
from edt_core.acceptance.subjects import Setting, new_state
from edt_core.models import model_config

state = new_state(training(), model_config('EDT-Tiny/2', 32, 10), torch.device('cpu'))
print(type(state.optimizer).__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "edt_core.acceptance.adan"


@pytest.mark.extern
def test_imports_with_torch_numpy_and_pyarrow_alone() -> None:
    """Each module of four packages in a Python where the other libraries cannot be imported."""
    folders = [ROOT / "edt_core" / package for package in ("models", "diffusion", "data", "evaluation/metrics")]
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
    ]
    assert len(names) > 50
    absent = [
        "ray",
        "mlflow",
        "diffusers",
        "pydantic",
        "webdataset",
        "sklearn",
        "pytorch_optimizer",
        "yaml",
        "rich",
    ]
    code = "; ".join(
        [f"import sys, importlib; sys.modules.update(dict.fromkeys({absent}))"]
        + [f"importlib.import_module({name!r})" for name in names]
    )
    # what a space has is asked of its network's file
    code += "; from edt_core.evaluation.metrics import space_metrics"
    code += "; [space_metrics(space) for space in ('inception', 'classifier', 'dinov2', 'clip')]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.extern
def test_the_command_line_imports_no_heavy_library() -> None:
    """`edt --help` answers at once because nothing heavy is imported for it."""
    code = "import sys, pipelines.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"torch", "ray", "mlflow", "diffusers", "pyarrow", "matplotlib", "numpy"} & set(done.stdout.split())

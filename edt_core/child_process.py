"""Python processes that this package starts. None of them imports from its working directory.

The working directory is data: a store, a folder of images, or where the user happens to be. With `-m` and `-c`, Python
puts it before the installed packages, so that a `mlflow/` or a `torch.py` in it would run.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_SAFE_PATH = "PYTHONSAFEPATH"
_PATHS = "PYTHONPATH"


def python_command(*arguments: str) -> list[str]:
    """The command of a Python child with these arguments: `-P` keeps the working directory off its path."""
    return [sys.executable, "-P", *arguments]


def child_environment(variables: Mapping[str, str] | None = None, **more: str) -> dict[str, str]:
    """The environment of a Python child: `variables` (default: this process's) and `more`.

    It keeps the working directory off the path of that child and of the Python processes that the child starts.
    Entries of PYTHONPATH become absolute, because the child may have another working directory; empty ones, which mean
    the working directory to Python, are removed. A checkout that this process runs from is added.
    """
    environment = {**(os.environ if variables is None else variables), **more, _SAFE_PATH: "1"}
    entries = [os.path.abspath(entry) for entry in environment.get(_PATHS, "").split(os.pathsep) if entry]
    if (checkout := _checkout()) and checkout not in map(os.path.realpath, entries):
        entries.append(checkout)
    if entries or _PATHS in environment:
        environment[_PATHS] = os.pathsep.join(entries)
    return environment


def _checkout() -> str | None:
    """The folder of a checkout that is not installed, which `python -m pipelines.cli` has put on the path.

    Child processes need it to find this package. None for an installed package.
    """
    folder = Path(__file__).resolve().parents[1]
    is_installed = folder.name in ("site-packages", "dist-packages")
    return str(folder) if not is_installed and str(folder) in map(os.path.realpath, sys.path) else None


def protect_children() -> None:
    """Keep the working directory off the path of every Python process that this one or a library in it starts.

    Ray, MLflow and multiprocessing start such processes. Call it at the start of a program, not on import, because
    commands of a notebook may need its folder.
    """
    os.environ[_SAFE_PATH] = "1"

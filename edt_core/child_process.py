"""Python processes that this package starts: none of them imports from the folder that it works in.

That folder is data: a store, a folder of images, the place a person happens to be in. Python puts it before the
installed packages for `-m` and `-c`, and so a `mlflow/` or a `torch.py` in it would run.
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
    Entries of PYTHONPATH are made absolute, because the child may work in another folder; empty ones, which Python
    takes for the working directory, are left out. A checkout that this process runs from is added.
    """
    environment = {**(os.environ if variables is None else variables), **more, _SAFE_PATH: "1"}
    entries = [os.path.abspath(entry) for entry in environment.get(_PATHS, "").split(os.pathsep) if entry]
    if (checkout := _checkout()) and checkout not in map(os.path.realpath, entries):
        entries.append(checkout)
    if entries or _PATHS in environment:
        environment[_PATHS] = os.pathsep.join(entries)
    return environment


def _checkout() -> str | None:
    """The folder of a checkout that is not installed, which `python -m pipelines.cli` in it has put on the path.

    Its children would not find this package without it. None for an installed package.
    """
    folder = Path(__file__).resolve().parents[1]
    installed = folder.name in ("site-packages", "dist-packages")
    return str(folder) if not installed and str(folder) in map(os.path.realpath, sys.path) else None


def protect_children() -> None:
    """Keep the working directory off the path of every Python process that this one starts, by libraries too.

    Ray, MLflow and multiprocessing start some of their own. For the start of a program: not for an import, because a
    notebook's own commands may want the folder that it is in.
    """
    os.environ[_SAFE_PATH] = "1"

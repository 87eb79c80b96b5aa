"""The stages of a pipeline, one per file. `python -m jobs.<stage>` runs one; the modules here are no commands."""

import sys
from importlib.util import find_spec

from edt_core.printing.console import say


def _refuse_to_run() -> None:
    """Exit with 2 under `python -m jobs.stages.<module>`, which would silently do nothing."""
    if sys.argv[:1] != ["-m"]:  # Python sets this only while it imports the packages of the module that it will run
        return
    modules = [argument.removeprefix("-m") for argument in sys.orig_argv]
    for name in (module.removeprefix(f"{__name__}.") for module in modules if module.startswith(f"{__name__}.")):
        command = f"jobs.{name}" if find_spec(f"jobs.{name}") else "jobs.preprocess, or another stage"
        say(f"error: {__name__}.{name} is not a command; run python -m {command}", err=True)
        sys.exit(2)


_refuse_to_run()

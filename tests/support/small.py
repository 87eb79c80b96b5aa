"""A pipeline on real digits, smaller than the quickstart only in its numbers; `edt` in this process or in its own."""

import contextlib
import io
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.outcome import Outcome

EDT = [sys.executable, "-m", "pipelines.cli"]
MODEL = "edt-tiny-digits-32"
SMALL = (
    "source.limit=400",
    "autoencoder.steps=8",
    "autoencoder.batch_size=8",  # with 64 the fit takes two thirds of the run
    "autoencoder.num_cpus=1",  # by default two threads, which wait for each other on a busy machine
    "classifier.num_cpus=1",
    "classifier.steps=20",
    "classifier.batch_size=64",
    "classifier.feature_dim=16",  # fewer than the samples: a Fréchet distance of fewer is refused
    "train.objective=epsilon",  # the paper's recipe, not that of the quickstart
    "train.timestep_sampler=loss-second-moment",
    "train.optimizer=adan",
    "train.max_steps=8",
    "train.log_every=4",
    "train.checkpoint_every=4",
    "sample.num_samples=40",
    "sample.num_sampling_steps=3",
    "sample.unit_size=20",
    "train.num_workers=1",  # two of each are tested with the jobs; here every process costs seconds
    "promote.margin=0",  # eight steps make the model better than the untrained one, but by less than 1 %
    "encode.num_workers=1",
    "sample.num_workers=1",
)
CANARY = "canary-5e1f0d"  # a secret in the environment of the run that tests share: nothing may keep it
STEPS = 12  # preprocess, autoencoder, encode, classifier, reference, 2 x (train, sample, evaluate), report


def environment(**more: str) -> dict[str, str]:
    """Of this process, without what would lead to somebody's cluster or tracking server, or tell a terminal's size.

    Importing readline puts LINES and COLUMNS where every child finds them, pytest-xdist's workers among them.
    """
    left_out = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "LINES", "COLUMNS")
    kept = {key: value for key, value in os.environ.items() if key not in left_out}
    return {**kept, **more}


def options(*assignments: str) -> list[str]:
    """`--set` for the small pipeline and these assignments."""
    return [part for text in (*SMALL, *assignments) for part in ("--set", text)]


def pipeline(store: Path, *assignments: str) -> "Outcome":
    """Run the small pipeline in this process, on the session's Ray."""
    from pipelines.config.schema import load_config
    from pipelines.pipeline import run
    from pipelines.terminal.terminal import Terminal

    with Terminal() as terminal:
        return run(load_config("quickstart", [*SMALL, *assignments], str(store)), terminal)


def copy_store(store: Path, to: Path) -> None:
    """Copy a store, so that what is done to the copy leaves it alone.

    Artifacts know no path; MLflow's database has absolute ones, and they are changed to those of the copy.
    """
    shutil.copytree(store, to, ignore=shutil.ignore_patterns("mlflow.db*"))
    before, after = (contextlib.closing(sqlite3.connect(place / "mlflow.db")) for place in (store, to))
    with before as original, after as database:
        original.backup(database)
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for _, column, kind, *_ in database.execute(f"PRAGMA table_info({table})").fetchall():
                if kind.startswith(("VARCHAR", "TEXT")):
                    changed = f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE instr({column}, ?)"
                    database.execute(changed, (str(store), str(to), str(store)))
        database.commit()


def edt(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`edt` to its end in this process, in a clean environment unless one is given: no imports to wait for.

    What it changes of the process is put back. A Ray session that there is, is used.
    """
    from pipelines import cli

    out, err = io.StringIO(), io.StringIO()
    with _put_back():
        os.environ.clear()
        os.environ.update(env or environment())
        os.chdir(cwd or os.getcwd())
        sys.argv = ["edt", *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    if code == 130:  # Ctrl-C is meant for the tests as well
        raise KeyboardInterrupt
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _put_back() -> Iterator[None]:
    """Environment, folder, arguments, threads and MLflow's server are afterwards what they were before."""
    before, folder, words = dict(os.environ), os.getcwd(), sys.argv
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 0
    try:
        yield
    finally:
        if mlflow := sys.modules.get("mlflow"):
            mlflow.set_tracking_uri(before.get("MLFLOW_TRACKING_URI"))  # None forgets what `edt` set
        if torch:
            torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(before)
        os.chdir(folder)
        sys.argv = words


def edt_process(
    *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`edt` to its end as a process: for what only a process shows, as an exit code or what a fresh import costs."""
    return subprocess.run(
        [*EDT, *arguments], capture_output=True, text=True, check=False, cwd=cwd, env=env or environment()
    )


def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
    """`edt` as a process whose output, errors included, can be read."""
    return subprocess.Popen(
        [*EDT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(**env)
    )


def start_run(store: Path, *assignments: str, **env: str) -> subprocess.Popen[str]:
    """`edt run quickstart` of the small size."""
    return start("run", "--store", str(store), *options(*assignments), **env)

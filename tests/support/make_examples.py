"""Run the commands of each example's README in a copy of its folder, and keep what they print and draw.

`python -m tests.support.make_examples [NAME ...]`, or `make examples` for all. It writes `terminal.md` and the pictures
into examples/NAME/output. The photos come from the folder in EDT_EXAMPLE_PHOTOS, laid out as <class>/<image>; without
it the example `photos` is left out.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.examples import EXAMPLES, NAMES, OUTPUT, TERMINAL, inputs_digest, typed
from tests.support.pages import ROOT
from tests.support.small import environment

PHOTOS = "EDT_EXAMPLE_PHOTOS"
ARRIVE = 10  # one photo in so many arrives after the first run
HEAD = TAIL = 30  # lines kept of what a command prints, where there are more of them
PATIENCE = 600  # seconds until a server must answer


def main() -> None:
    """Make the outputs of the named examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NAMES)} [default: all]")
    parser.add_argument("--folder", type=Path, help="work here and keep it, so that a later call reuses what is done")
    given = parser.parse_args()
    for name in given.names or NAMES:
        if name == "photos" and PHOTOS not in os.environ:
            print(f"photos is left out: set {PHOTOS} to a folder <class>/<image>")
            continue
        with TemporaryDirectory() as folder:
            make(name, (given.folder or Path(folder)).resolve() / name)


def make(name: str, folder: Path) -> None:
    """Run an example in `folder`, and write its output and pictures beside its README."""
    shutil.copytree(EXAMPLES / name, folder, ignore=shutil.ignore_patterns(OUTPUT, "edt-store"), dirs_exist_ok=True)
    if name == "photos":
        lay_out(Path(os.environ[PHOTOS]), folder)
    start = time.monotonic()
    sections = [*run(name, folder)]
    minutes = (time.monotonic() - start) / 60
    output = EXAMPLES / name / OUTPUT
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    machine = f"on {os.cpu_count()} CPU cores, in {minutes:.0f} minutes"
    made = f"Made by `make examples` at commit {commit()}, {machine}, of the inputs {inputs_digest(name)}."
    head = f"# Output of the example {name}\n{made}"
    (output / TERMINAL).write_text("\n\n".join([head, *sections]) + "\n")
    for picture in folder.glob("*.png"):
        shutil.copy(picture, output)


def lay_out(photos: Path, folder: Path, arrive: int = ARRIVE) -> None:
    """Copy the photos to photos/<class>, and of each class one in `arrive` to arrived/<class>."""
    for label in sorted(path for path in photos.iterdir() if path.is_dir()):
        for index, photo in enumerate(sorted(label.iterdir())):
            place = folder / ("arrived" if index % arrive == arrive - 1 else "photos") / label.name
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(photo, place)


def run(name: str, folder: Path) -> Iterator[str]:
    """What each command of the README prints, as a section of Markdown."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = environment(PATH=path, PYTHONPATH=str(ROOT), COLUMNS="120", EDT_CACHE_DIR=str(folder.parent / "cache"))
    env["PYTHONWARNINGS"] = "ignore"  # of libraries, with paths of this machine
    with contextlib.ExitStack() as servers:
        for command in typed(name):
            print(f"{name}: {command.text}", flush=True)
            if command.words[0] == "export":
                env |= dict(word.split("=", 1) for word in command.words[1:])
            elif command.text.startswith("mlflow models serve"):
                servers.enter_context(server(command.words, folder, env))
            else:
                yield section(command.text, said(command.text, folder, env))


def said(text: str, folder: Path, env: dict[str, str]) -> str:
    """What a command prints. Raises RuntimeError where it fails."""
    text = re.sub(r"^edt(?= )", f"{shlex.quote(sys.executable)} -m pipelines.cli", text)
    done = subprocess.run(
        text, shell=True, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{text} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout.replace(f"{folder}/", "").replace(str(folder), ".")


def section(command: str, text: str) -> str:
    """A command with the beginning and the end of what it printed."""
    lines = text.rstrip().splitlines()
    if len(lines) > HEAD + TAIL:
        lines = [*lines[:HEAD], f"... {len(lines) - HEAD - TAIL} more lines", *lines[-TAIL:]]
    shown = "\n".join(line.rstrip() for line in lines)
    return f"## `{command}`\n```text\n{shown}\n```" if shown else f"## `{command}`\nIt prints nothing."


@contextlib.contextmanager
def server(words: list[str], folder: Path, env: dict[str, str]) -> Iterator[None]:
    """`mlflow models serve` while the commands after it run."""
    address = f"http://127.0.0.1:{words[words.index('--port') + 1]}/ping"
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(words, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no answer at {address}:\n{(folder / 'server.log').read_text()}")
            time.sleep(1)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        process.wait()


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def commit() -> str:
    """The commit of the code, with `+dirty` if the packages have changes that are not committed."""
    head, changed = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--short", "edt_core", "jobs", "pipelines"))
    )
    return f"{head}+dirty" if changed else head


if __name__ == "__main__":
    main()

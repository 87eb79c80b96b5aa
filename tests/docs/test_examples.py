"""The examples: every command of their READMEs, run in order with small sizes; their configurations and outputs.

Photos are made of digits here, and the server of `mlflow models serve` runs in this process.
"""

import contextlib
import re
import runpy
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from pipelines.config.schema import load_config
from tests.docs.test_commands import check_edt
from tests.support import make_examples
from tests.support.examples import EXAMPLES, NAMES, OUTPUT, TERMINAL, inputs_digest, readme, typed
from tests.support.jobs import command as job
from tests.support.pages import Command
from tests.support.processes import wait_for
from tests.support.small import MODEL, SMALL, copy_store, edt

if TYPE_CHECKING:
    from pipelines.outcome import Outcome

MOST_FILE, MOST_OUTPUT = 200_000, 400_000  # bytes
_CHAIN = ("--num-sampling-steps", "2")
# Sizes that end a command: the last value of an option counts.
SIZES = {
    "doctor": ("--quick",),
    "sample": ("--num", "1", *_CHAIN),
    "evaluate": ("--num-samples", "20", "--unit-size", "20", *_CHAIN),
    "preprocess": ("--limit", "200"),
    "jobs.autoencoder": ("--steps", "2", "--batch-size", "8"),
    "jobs.classifier": ("--steps", "8", "--base-channels", "4", "--feature-dim", "8"),
}
# After fits in small batches, eight steps on 28 images are not measured as better than none: there is no champion.
FITS = {"photos": ("autoencoder.batch_size=64", "classifier.batch_size=128")}
pytestmark = pytest.mark.usefixtures("training_here")


class Reader:
    """A person who types an example's commands in a copy of its folder. The server is one of this process."""

    def __init__(self, name: str, folder: Path, servers: contextlib.ExitStack) -> None:
        shutil.copytree(EXAMPLES / name, folder, ignore=shutil.ignore_patterns(OUTPUT, "edt-store"))
        self.sizes = [part for text in (*SMALL, *FITS.get(name, ())) for part in ("--set", text)]
        self.folder, self.servers, self.url = folder, servers, ""
        self.said: dict[str, str] = {}

    def type(self, command: Command) -> None:
        """Run a command. Raises AssertionError where it fails."""
        words = command.words
        with contextlib.chdir(self.folder):
            if words[0] == "edt":
                check_edt(words)
                self.edt(command)
            elif words[0] == "cp":
                shutil.copytree(words[2], words[3], dirs_exist_ok=True)
            elif words[:2] == ["mlflow", "models"]:
                self.url = self.servers.enter_context(served(self.folder, words[words.index("--model-uri") + 1]))
            elif words[:3] == ["python", "-P", "-m"]:
                done = job(words[3].removeprefix("jobs."), *words[4:], *SIZES.get(words[3], ()))
                assert done.returncode == 0, done.stdout + done.stderr
            elif words[0] == "python":
                self.script(words[1])
            else:
                assert words[0] == "export", f"{command} is not run by this test"

    def edt(self, command: Command) -> None:
        verb, *options = command.words[1:]
        if verb in ("run", "plan"):  # before the command's own `--set`, which must stay what it is
            options = [options[0], *self.sizes, *options[1:]]
        done = edt(verb, *options, *SIZES.get(verb, ()), cwd=self.folder)
        codes = (0, 1) if command.words[1] == "doctor" else (0,)
        assert done.returncode in codes, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        self.said[command.text] = done.stdout + done.stderr

    def script(self, name: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [name, *([self.url] if self.url else [])])
            runpy.run_path(name, run_name="__main__")

    def said_by(self, beginning: str) -> str:
        """What the first command with this beginning printed."""
        return next(said for text, said in self.said.items() if text.startswith(beginning))


@contextlib.contextmanager
def served(folder: Path, model: str) -> Iterator[str]:
    """The address of the application that `mlflow models serve` runs, in a thread of this process."""
    import mlflow
    import uvicorn
    from mlflow.pyfunc.scoring_server import init

    with pytest.MonkeyPatch.context() as patch, socket.socket() as listener:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/edt-store/mlflow.db")
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(init(mlflow.pyfunc.load_model(model)), log_level="error"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/invocations"
        server.should_exit = True
        thread.join()


@pytest.fixture
def servers() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def test_digits_run_as_the_quickstart(
    first: "Outcome", store: Path, tmp_path: Path, servers: contextlib.ExitStack
) -> None:
    """On a store with a finished quickstart: everything is reused, for the configurations are the same."""
    reader = Reader("digits", tmp_path / "digits", servers)
    copy_store(store, reader.folder / "edt-store")
    for command in typed("digits"):
        reader.type(command)
    assert re.search(r"^reuse +train", reader.said_by("edt plan edt.yaml"), re.MULTILINE)
    assert re.search(r"^run +train", reader.said_by("edt plan edt.yaml --set"), re.MULTILINE)
    assert MODEL in reader.said_by("edt models")
    assert (reader.folder / "samples.png").is_file()
    assert first.metrics


def test_photos_arrive_and_the_model_is_retrained(
    digits_folder: Path, tmp_path: Path, servers: contextlib.ExitStack
) -> None:
    reader = Reader("photos", tmp_path / "photos", servers)
    make_examples.lay_out(digits_folder, reader.folder, arrive=4)
    for command in typed("photos"):
        reader.type(command)
    assert "32: +8 -0 images" in reader.said_by("edt retrain edt-tiny-photos-32 --plan")
    assert "edt-tiny-photos-32" in reader.said_by("edt schedule list")
    assert {path.name for path in reader.folder.glob("*.png")} == {"samples.png", "retrained.png"}


def test_a_released_checkpoint_is_imported_measured_and_served(tmp_path: Path, servers: contextlib.ExitStack) -> None:
    reader = Reader("released", tmp_path / "released", servers)
    for command in typed("released"):
        reader.type(command)
    assert "edt-tiny-2-32 version 1 is EDT-Tiny/2 at 32 px with 10 classes" in reader.said_by("edt import")
    assert "accuracy_classifier" in reader.said_by("edt evaluate")
    assert {path.name for path in reader.folder.glob("*.png")} == {"samples.png", "answer.png", "further.png"}


def test_the_digits_are_the_quickstart() -> None:
    assert load_config(str(EXAMPLES / "digits" / "edt.yaml")) == load_config("quickstart")


def test_the_table_has_every_example() -> None:
    folders = {path.parent.name for path in EXAMPLES.glob("*/README.md")}
    assert folders == set(NAMES)
    assert all(f"]({name}/README.md)" in (EXAMPLES / "README.md").read_text() for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_output_is_of_the_commands_of_the_readme(name: str) -> None:
    headings = re.findall(r"^## `(.+)`$", (EXAMPLES / name / OUTPUT / TERMINAL).read_text(), re.MULTILINE)
    run = [command.text for command in typed(name) if command.words[0] not in ("export", "mlflow")]
    assert headings == run, "make examples"


@pytest.mark.parametrize("name", NAMES)
def test_the_output_is_small_and_names_no_machine(name: str) -> None:
    files = [path for path in (EXAMPLES / name).rglob("*") if path.is_file() and OUTPUT in path.parts]
    sizes = {path.name: path.stat().st_size for path in files}
    assert {path.suffix for path in files} == {".md", ".png"}
    assert max(sizes.values()) <= MOST_FILE
    assert sum(sizes.values()) <= MOST_OUTPUT
    text = (EXAMPLES / name / OUTPUT / TERMINAL).read_text()
    assert not re.findall(r"(?<![\w:.])/(?:tmp|home|root|work|mnt)/\S*", text)
    assert "Traceback" not in text
    assert re.search(r"at commit [0-9a-f]{12}, on \d+ CPU cores", text)
    assert f"of the inputs {inputs_digest(name)}." in text, "make examples"


@pytest.mark.parametrize("name", NAMES)
def test_each_picture_is_shown(name: str) -> None:
    shown = set(re.findall(r"!\[[^\]]+\]\(output/([\w-]+\.png)\)", readme(name).read_text()))
    assert shown == {path.name for path in (EXAMPLES / name / OUTPUT).glob("*.png")}


@pytest.mark.parametrize("name", NAMES)
def test_each_configuration_explains_its_fields(name: str) -> None:
    text = (EXAMPLES / name / "edt.yaml").read_text()
    assert text.startswith("# ")
    assert yaml.safe_load(text)["name"]
    assert sum("  # " in line for line in text.splitlines()) >= 6

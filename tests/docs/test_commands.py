"""Every command of README, CONTRIBUTING and docs: run for real where a machine without GPU, network and cluster can, in
a folder with small things in the places of large ones (`sandbox.py`), and else checked as far as it can be.

What is only checked is listed here with its reason. A command that is in no list is run; one that cannot be, fails.
"""

import contextlib
import importlib.util
import io
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from pipelines.cli import app
from pipelines.config.schema import config_names, load_config
from tests.support import examples
from tests.support.pages import ROOT, Command, commands, failures, named, pages
from tests.support.sandbox import Sandbox

# Commands that are checked and not run: why, and where what they do is tested, if it is.
CHECKED: tuple[tuple[str, str], ...] = (
    (r"make ", "sets up an environment of its own, or is what runs this test: tests/test_imports.py"),
    (r"pip |docker |(kubectl|\w+=\$\(kubectl) |ray |cd |cp |export ", "needs a network, Docker or a cluster"),
    (r"edt serve ", "never ends: tests/pipelines/test_serve_command.py"),
    (r"mlflow models serve ", "never ends: tests/pipelines/test_serving.py"),
    (r"(\S+/)?(python|pytest) .*(pytest|tests)", "is this suite, or takes as long as a benchmark does"),
    (r"python -m edt_core\.acceptance ", "is for a GPU: tests/edt_core/test_acceptance.py"),
    (r".*edt bench ", "measures for minutes to hours: tests/jobs/test_bench_train.py"),
    (r"edt reproduce ", "tests/pipelines/test_workflow_again.py"),
    (r"edt submit ", "needs a cluster's dashboard: tests/pipelines/test_submit.py"),
    (r"edt schedule serve", "never ends: tests/pipelines/test_schedule.py"),
    (r"edt webhook .*mlflow:5000", "needs an MLflow server: tests/pipelines/test_webhook.py"),
    (r"edt run .*wandb", "needs the package wandb: tests/pipelines/test_wandb.py"),
    (r"edt run .*init_from=dit-xl", "needs published weights: tests/edt_core/test_training_start.py"),
    (r"edt models push (?!.*--dry-run)", "needs a hub: tests/pipelines/test_push.py"),
    (r"edt ui", "never ends: tests/pipelines/test_ui.py"),
    (r"edt train .*--use-gpu true", "needs GPUs: tests/jobs/test_train_verb.py"),
    (r"edt run imagenet.* --store /shared", "needs ImageNet and a cluster: tests/pipelines/test_workflow.py"),
    (r"edt scaling ", "needs a checkout's configurations, trains nine models: tests/pipelines/test_ladder.py"),
    (r"edt tune ", "trains several models: tests/pipelines/test_tune.py"),
    (r"edt run \S*next\.yaml", "needs the result of a search: tests/pipelines/test_tune.py"),
    (r"edt paper \d", "trains for an hour: tests/pipelines/test_paper.py"),
    (r"edt models set-chain ", "needs results of edt pareto: tests/jobs/test_pareto.py"),
    (r"edt prune ", "trains a shallower model: tests/pipelines/test_prune_command.py"),
    (r"edt distill ", "trains a student: tests/pipelines/test_distill_command.py"),
    (r"edt quantize ", "samples twice and evaluates: tests/pipelines/test_quantize.py"),
    (r"edt ema ", "needs a training with snapshots: tests/pipelines/test_ema.py"),
    (r"edt evaluate .*ema=", "needs a training with snapshots: tests/jobs/test_posthoc.py"),
    (r"edt encode .*--dinov2-weights", "needs published weights: tests/jobs/test_train_features.py"),
    (r"edt plan .*guide=step-", "needs more steps than the small pipeline has: tests/pipelines/test_guide.py"),
    (r"edt pareto ", "samples dozens of settings: tests/jobs/test_pareto.py"),
    (r"edt evaluate .*--statistics", "needs ADM's and Inception's published files: tests/jobs/test_evaluation.py"),
)
# Commands that train or trace for long what other tests train and trace: run by `make test-all`, else only checked.
LONG: tuple[tuple[str, str], ...] = (
    (r"edt export .* --format torch-export", "tests/jobs/test_export_model.py"),
    (
        r"edt run .*train\.init_from=edt-tiny-digits-32@champion --set train\.trainable",
        "tests/pipelines/test_init_from.py",
    ),
    (r"edt run .*train\.objective=epsilon", "tests/support/small.py: the recipe of the small pipeline"),
    (r"edt run .*along\.every", "tests/pipelines/test_along.py"),
    (r"edt run .*train\.max_steps=5000$", "tests/pipelines/test_workflow_again.py"),
    (r"edt run .*validation\.enabled=true", "tests/pipelines/test_validation.py"),
)
# Commands that may end with 1 as well: the gate refuses, or a check finds what is missing here. All others end with 0.
CODES = {r"edt models promote .*/2$": (0, 1), r"edt doctor ": (0, 1)}
# Those of the examples run in folders of their own: test_examples.py.
COMMANDS = [command for page in pages() if page.parent.name not in examples.NAMES for command in commands(page)]


def reason(command: Command) -> str | None:
    return next((why for pattern, why in CHECKED if re.match(pattern, command.text)), None)


RUN = [command for command in COMMANDS if reason(command) is None]


def is_long(command: Command) -> bool:
    return any(re.match(pattern, command.text) for pattern, _ in LONG)


def by_length(command: Command) -> Any:
    return pytest.param(command, marks=pytest.mark.slow) if is_long(command) else command


@pytest.mark.usefixtures("training_here")
@pytest.mark.parametrize("command", map(by_length, RUN), ids=str)
def test_a_command_runs(command: Command, sandbox: Sandbox) -> None:
    assert command.words[0] == "edt", f"{command} is neither run nor listed as checked"
    check_edt(command.words)
    done = sandbox.run(command.text)
    allowed = next((codes for pattern, codes in CODES.items() if re.search(pattern, sandbox.small(command.text))), (0,))
    assert done.code in allowed, f"{sandbox.small(command.text)} ended with {done.code}:\n{done.said}"


def test_a_command_that_is_not_run_is_known() -> None:
    checked = [command for command in COMMANDS if reason(command) or is_long(command)]
    assert not (wrong := failures(checked, lambda command: check(command.text))), wrong


def test_a_command_that_the_text_names_is_known() -> None:
    found = [command for page in pages() for command in named(page)]
    assert len(found) > 50
    assert not (wrong := failures(found, lambda command: check(command.text, whole=False))), wrong


def test_no_reason_is_stale_and_each_test_it_names_is_there() -> None:
    for pattern, why in (*CHECKED, *LONG):
        assert any(re.match(pattern, command.text) for command in COMMANDS), f"no page has {pattern!r} any more"
        for name in re.findall(r"tests/[\w/]+\.py", why):
            assert (ROOT / name).is_file(), f"{pattern!r} is said to be tested by {name}, which is not there"
    assert len(RUN) > len(COMMANDS) / 2, "most commands run"


# --- what can be told without running


def check(text: str, whole: bool = True) -> None:
    """That a command is one: its subcommand, options, targets, modules and files are there."""
    words = Command("", 0, re.sub(r"^\w+=\S+ (?=edt)", "", text)).words
    tool = words[0].rpartition("/")[2]
    if tool == "edt":
        check_edt(words, whole)
    elif tool == "make":
        for target in words[1:]:
            assert not (told := refusal_of_make(target)), f"make has no target {target}: {told}"
    elif "-m" in words and words[words.index("-m") + 1] != "slow":
        assert importlib.util.find_spec(words[words.index("-m") + 1].replace("<verb>", "train"))
    for word in words:
        if re.match(r"(infra|tests|docs|pipelines|jobs|edt_core)/", word):
            assert (ROOT / word).exists() or word.startswith("docs/"), f"there is no {word}"


@cache
def refusal_of_make(target: str) -> str:
    """What make says where it cannot tell how to make a target."""
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def check_edt(words: list[str], whole: bool = True) -> None:
    """That the subcommand is there and its own parser knows the options; `whole`: that it takes all of it."""
    command = whole_app()
    at = 1
    while at < len(words) and hasattr(command, "commands"):
        if words[at] in command.commands:
            command, at = command.commands[words[at]], at + 1
        elif command.name == "schedule":  # `add` may be left out
            command = command.commands["add"]
        else:
            assert words[at].startswith("-"), f"{' '.join(words)}: there is no command {words[at]!r}"
            break
    if command.context_settings.get("ignore_unknown_options"):  # it has a parser of its own
        known = set(re.findall(r"--[a-z][a-z0-9-]*", help_of(command.name)))
    else:
        known = {option for parameter in command.params for option in parameter.opts}
        if whole and not hasattr(command, "commands"):
            check_config(command.make_context(command.name, words[at:]).params)
    unknown = {word.partition("=")[0] for word in words[at:] if word.startswith("--")} - known - {"--help"}
    assert not unknown, f"{' '.join(words)}: unknown options {sorted(unknown)}"


def check_config(given: dict[str, Any]) -> None:
    """That a shipped configuration takes the assignments."""
    if given.get("config") in config_names():
        load_config(given["config"], given["assignments"])


@cache
def whole_app() -> Any:
    return get_command(app)


@cache
def help_of(name: str) -> str:
    """What a verb with a parser of its own says of itself."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        whole_app().commands[name].main(["--help"], prog_name=f"edt {name}", standalone_mode=False)
    return said.getvalue()


# --- the reading itself


def test_pages_are_read_as_a_person_reads_them(tmp_path: Path) -> None:
    read = {
        "# T\n    edt run a \\\n        --set b='#1'   # why\n": ["edt run a --set b='#1'"],
        "```yaml\nedt: 1\n```\n\n    a/b/c   # a layout\n": [],
        "```sh\nmake a && pip install b\n```\n": ["make a", "pip install b"],
        "text\n\n    edt a\n\n    edt b\n": ["edt a", "edt b"],
    }
    for page, found in read.items():
        (tmp_path / "page.md").write_text(page)
        assert [command.text for command in commands(tmp_path / "page.md")] == found


def test_a_line_among_commands_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("    edt run\n    rm -r x\n")
    with pytest.raises(ValueError, match=r"page.md:2 'rm -r x' stands among commands"):
        list(commands(tmp_path / "page.md"))

"""Configurations that a stranger wrote: each is refused within seconds, with one message that says what is wrong."""

import getpass
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from edt_core.environment import quiet_defaults
from edt_core.files.small_files import MAX_CONFIG_BYTES
from pipelines.config.schema import as_yaml, load_config
from tests.support.small import edt, environment

_VALID = "name: n\nsource: {kind: digits}\nmodels: {a: {}}\n"
_BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 10)
)
HOSTILE = {
    "alias bomb": (_BOMB, "aliases repeat more than"),
    "alias in itself": ("a: &a [*a]\n", "inside the value that it repeats"),
    "3,000 lists deep": (f"name: {'[' * 3000}{']' * 3000}\n", "nested more than 50 levels"),
    "6,000 digits": (f"name: n\nseed: {'9' * 6000}\n", "digits"),
    "a hexadecimal number of 100,000 digits": (f"name: 0x{'f' * 100_000}\n", "more than 64 bits"),
    "no date": ("name: 2024-13-45\n", "month must be in"),
    "120,000 values": (f"name: [{'x,' * 120_000}]\n", "more than 100,000 values"),
    "a key twice": (f"{_VALID}name: other\n", "'name' occurs twice, first in line 1"),
    "a key twice in a section": (
        _VALID.replace("kind: digits", "kind: digits, kind: auto"),
        "'kind' occurs twice, first in line 2",
    ),
    "Latin-1": ("name: caf\xe9\n".encode("latin-1"), "is not UTF-8 text: byte 0xe9 at position 9"),
    "UTF-16": (_VALID.encode("utf-16"), "is not UTF-8 text"),
    "a NUL": (f"{_VALID}#\0\n", "special characters are not allowed"),
    "an escape sequence": ("name: \x1b]0;owned\x07\n", "special characters are not allowed"),
    "an object of Python": ("name: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
    "empty": ("", "expected a mapping of fields"),
    "not a number": (f"{_VALID}train: {{lr: .nan}}\n", "train.lr"),
    "infinite": (f"{_VALID}train: {{lr: .inf}}\n", "train.lr"),
    "too large": (f"{_VALID}# {'x' * MAX_CONFIG_BYTES}", "bytes, but such a file may have at most 4,194,304"),
}


# Both read with the same function; that the other command refuses with one message, a text shows.
SHOWN = {"alias bomb": ("config", "show"), "empty": ("config", "show")}


@pytest.mark.parametrize(
    ("text", "message", "command"),
    [(*case, SHOWN.get(name, ("config", "validate"))) for name, case in HOSTILE.items()],
    ids=HOSTILE,
)
def test_it_is_refused_with_one_message(
    text: str | bytes, message: str, command: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    done = edt(*command, str(path), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    told = done.stdout + done.stderr
    assert message in told
    assert "bug in this program" not in told
    assert "Traceback" not in told
    assert len(told) < 3000


@pytest.mark.parametrize("text", [f"\ufeff{_VALID}", _VALID.replace("\n", "\r\n")], ids=["byte order mark", "CRLF"])
def test_what_editors_write_is_read(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode())
    assert load_config(str(path)).name == "n"


def test_the_names_of_22_000_classes_are_read(tmp_path: Path) -> None:
    names = "".join(f"    - n{k:08d} a name of some length\n" for k in range(22_000))
    (tmp_path / "large.yaml").write_text(
        f"name: large\nmodels: {{m: {{}}}}\nsource:\n  path: /data\n  kind: image_folder\n  classes:\n{names}"
    )
    assert len(load_config(str(tmp_path / "large.yaml")).source.classes) == 22_000


def test_anchors_that_repeat_little_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: n\nsource: {kind: digits}\n"
        "models:\n  a: &a {lr: 0.1, warmup_steps: 3}\n  b: {<<: *a, lr: 0.2}\n  c: *a\n"
    )
    models = load_config(str(path)).models
    assert models["b"] == {"lr": 0.2, "warmup_steps": 3}
    assert models["c"] == models["a"]


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 << 30)


def _loop(path: Path) -> None:
    path.symlink_to(path)


NOT_FILES = {
    "FIFO": (_fifo, "is a FIFO"),
    "folder": (Path.mkdir, "is a folder"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "10 GB of nothing": (_sparse, "at most 4,194,304"),
    "loop": (_loop, "symbolic links"),
}


@pytest.mark.parametrize(("make", "message"), NOT_FILES.values(), ids=NOT_FILES)
def test_what_is_no_plain_file_is_not_read(make: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    make(path)  # type: ignore[operator]
    for arguments in (("config", "validate", str(path)), ("preprocess", "in", "out", "--config", str(path))):
        done = edt(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["x" * 300 + ".yaml", "x" * 255, "/".join(["y" * 100] * 50), "a:b.yaml", "s3://a:b"])
def test_names_that_no_file_has(name: str, tmp_path: Path) -> None:
    done = edt("run", name, "--dry-run", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "bug in this program" not in done.stderr


@pytest.mark.parametrize("name", ["a:b.yaml", "n" * 250 + ".yaml", "ü \u202e.yaml"])
def test_odd_names_of_configurations_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(_VALID)
    assert edt("config", "validate", name, cwd=tmp_path).returncode == 0


def test_an_assignment_is_read_as_carefully() -> None:
    for value in ("[" * 3000, "9" * 6000, "{a: 1, a: 2}"):
        done = edt("config", "show", "quickstart", "--set", f"name={value}")
        assert done.returncode == 2
        assert "bug in this program" not in done.stderr


def test_a_user_without_an_account_has_a_name_and_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    for variable in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv(variable, "x")  # so that it is put back as it was
        monkeypatch.delenv(variable)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    quiet_defaults()
    assert getpass.getuser() == f"uid-{os.getuid()}"
    home = Path.home()
    assert home.is_dir()
    assert home.stat().st_mode & 0o077 == 0
    quiet_defaults()
    assert Path.home() == home


def test_a_home_of_somebody_else_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    from edt_core.environment import _temporary_home

    (tmp_path / "edt-home-12345").symlink_to(tmp_path)
    home = Path(_temporary_home(12345))
    assert home != tmp_path / "edt-home-12345"
    assert home.parent == tmp_path


@pytest.mark.extern
def test_the_locale_decides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(_VALID.replace("name: n", "name: café"), encoding="utf-8")
    code = """
import sys
from pipelines.cli import main
from pipelines.config.schema import load_config

for words in (("config", "validate"), ("config", "show"), ("run", "--dry-run")):
    sys.argv = ["edt", *words, sys.argv[-1]]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, words
assert load_config(sys.argv[-1]).name == "caf" + chr(233)
"""
    settings = environment(LC_ALL="POSIX", PYTHONUTF8="0", PYTHONPATH=str(Path(__file__).parents[2]))
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, check=False, env=settings, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "caf" in as_yaml(load_config(str(path)))

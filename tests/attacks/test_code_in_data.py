"""Code that lies in a folder of data: a store, a folder of images, the place where somebody gives a command."""

import ast
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from edt_core.child_process import child_environment, protect_children, python_command
from edt_core.errors import UserError
from pipelines.cluster.submission import request_for
from pipelines.schedule import server as scheduler
from pipelines.schedule.record import Schedules, new_schedule
from pipelines.setup import doctor_services
from tests.support.registry import Registry, write_empty_mlflow
from tests.support.small import edt

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("edt_core", "jobs", "pipelines")
NAMES = ("edt_core", "jobs", "pipelines", "mlflow", "ray", "uvicorn", "torch", "json", "multiprocessing")
HELPER = ROOT / "edt_core" / "child_process.py"


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that is there once code of `trapped` has run."""
    return tmp_path / "canary"


@pytest.fixture
def trapped(tmp_path: Path, canary: Path) -> Path:
    """A folder with a package or a module by each name that a Python child could import first."""
    folder = tmp_path / "trapped"
    folder.mkdir()
    set_traps(folder, canary)
    return folder


def set_traps(folder: Path, canary: Path) -> None:
    code = f"import sys\nopen({str(canary)!r}, 'a').write(__name__ + '\\n')\n"
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(code)
    for name in ("sitecustomize", "usercustomize", "torch_extra", "numpy"):
        (folder / f"{name}.py").write_text(code)


def our_copy() -> dict[str, str]:
    """Where children find this copy of the packages, as an installed one is found."""
    return {"PYTHONPATH": str(ROOT)}


@pytest.mark.extern
@pytest.mark.parametrize("arguments", [("-c", "import json, torch_extra"), ("-m", "mlflow", "--version")])
def test_the_trap_works(arguments: tuple[str, ...], trapped: Path, canary: Path) -> None:
    """Without the helper, the folder's code runs."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    subprocess.run([sys.executable, *arguments], cwd=trapped, env=environment, capture_output=True, check=False)
    assert canary.exists()


@pytest.mark.extern
@pytest.mark.parametrize("paths", ["", os.pathsep, f"{os.pathsep}{ROOT}", f"{ROOT}{os.pathsep}"])
def test_a_child_and_its_children_import_nothing_from_their_folder(paths: str, trapped: Path, canary: Path) -> None:
    """Nor by an empty entry of PYTHONPATH, which Python takes for the working directory."""
    inner = "import json, multiprocessing, subprocess, sys; print(json.dumps(sys.path))"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    environment = child_environment({**os.environ, "PYTHONPATH": paths})
    command = python_command("-c", outer)
    done = subprocess.run(command, cwd=trapped, env=environment, capture_output=True, text=True, check=True)
    assert str(trapped) not in json.loads(done.stdout)
    assert "" not in json.loads(done.stdout)
    assert not canary.exists()


def test_relative_entries_of_a_path_are_those_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/usr/lib/python"])  # this package is installed
    paths = os.pathsep.join(["lib", "", "/usr/lib/mine"])
    told = child_environment({"PYTHONPATH": paths}, MORE="1")
    assert told == {
        "PYTHONPATH": f"{tmp_path / 'lib'}{os.pathsep}/usr/lib/mine",
        "PYTHONSAFEPATH": "1",
        "MORE": "1",
    }
    assert "PYTHONPATH" not in child_environment({})


@pytest.mark.parametrize("paths", [{}, {"PYTHONPATH": "/usr/lib/mine"}, {"PYTHONPATH": str(ROOT)}])
def test_children_of_a_checkout_that_is_not_installed_find_the_package(
    paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of `python -m pipelines.cli schedule serve` there: it is on the path by being the working directory."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", ["", "/usr/lib/python"])
    entries = child_environment(paths)["PYTHONPATH"].split(os.pathsep)
    assert entries[: len(paths)] == list(paths.values())
    assert entries.count(str(ROOT)) == 1


@pytest.mark.extern
def test_a_spawned_process_imports_nothing_from_its_folder(
    trapped: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the benchmark's workers are, and whatever a library starts by multiprocessing."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    protect_children()
    monkeypatch.chdir(trapped)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(trapped))])
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=print)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not canary.exists()


@pytest.mark.extern
def test_a_store_s_mlflow_folder_is_not_the_server_that_shows_it(
    tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`edt ui`, whose server starts one more that puts the folder it works in on its path."""
    from pipelines.cluster.ui import free_port, served

    store = tmp_path / "store"
    Registry(store).run()
    set_traps(store, canary)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(store)
    port = free_port("127.0.0.1", 0)
    with served(f"sqlite:///{store / 'mlflow.db'}", store / "mlartifacts", "127.0.0.1", port) as (url, _):
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(url) as page:
            assert b"<html" in page.read().lower()
    assert not canary.exists(), canary.read_text()


@pytest.mark.ray
def test_the_doctor_and_ray_s_workers_run_nothing_of_the_folder_they_are_asked_in(
    trapped: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe starts a Ray session there and runs a task in it."""
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(trapped)
    monkeypatch.setattr(doctor_services, "_RAY_SECONDS", 600)
    told = doctor_services._run_probe(None, 1, [])
    assert told["nodes"] == 1, told
    assert not canary.exists(), canary.read_text()


@pytest.mark.ray
def test_a_worker_imports_from_the_driver_s_folders_alone(trapped: Path, canary: Path) -> None:
    code = (
        "import json, sys, ray; from jobs.runtime.cluster import connect; connect()\n"
        "look = ray.remote(lambda: __import__('sys').path)\n"
        "print(json.dumps(ray.get(look.remote()))); ray.shutdown()"
    )
    left_out = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    given = {name: value for name, value in os.environ.items() if name not in left_out}
    environment = child_environment(given, **our_copy())
    command = python_command("-c", code)
    done = subprocess.run(command, cwd=trapped, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    path = json.loads(done.stdout.splitlines()[-1])
    assert str(trapped) not in path
    assert str(ROOT) in path
    assert not canary.exists(), canary.read_text()


@pytest.mark.extern
def test_a_tick_runs_nothing_of_the_folder_that_its_schedule_was_made_in(
    tmp_path: Path, trapped: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real command of a tick, in the folder and the environment that the server gives it; `--help` ends it."""
    store = tmp_path / "store"
    write_empty_mlflow(store)
    monkeypatch.chdir(trapped)
    made = new_schedule(None, "quickstart", [], str(store), "* * * * *", "UTC")
    schedules = Schedules.at(str(store))
    schedules.put(made)
    schedules.write(made.model_copy(update={"since": datetime(2020, 1, 1, tzinfo=UTC)}))
    line = scheduler.command(made)
    shown = [*line[: line.index("run") + 1], "--help"]
    monkeypatch.setattr(scheduler, "command", lambda schedule: shown)
    server = scheduler.Server(schedules, print, 0.02)
    server.environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server.attend("quickstart")
    last = schedules.state("quickstart").last
    assert last is not None
    assert last.outcome == "finished", last
    assert not canary.exists(), canary.read_text()


def test_a_submitted_job_does_not_import_from_its_working_directory() -> None:
    from pipelines.config.schema import load_config

    request = request_for(load_config("quickstart", [], "s3://bucket/store"), "http://cluster:8265", {})
    assert request.entrypoint.startswith("python -P -m pipelines.cli ")


def test_a_configuration_cannot_be_an_option_of_a_tick_s_command(tmp_path: Path) -> None:
    made = new_schedule("x", "quickstart", [], str(tmp_path), "* * * * *", "UTC")
    line = scheduler.command(made.model_copy(update={"config": "--store=/elsewhere"}))
    assert line[-2:] == ["--", "--store=/elsewhere"]


def python_children(path: Path) -> Iterator[str]:
    """Where a module starts a Python process without the helper, or makes its own search path."""
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Constant) else ""
        if text in ("sys.executable", "sys.path.insert", "sys.path.append", "sys._base_executable"):
            yield f"line {node.lineno}: {text}"
        if isinstance(node, ast.List) and node.elts and isinstance(node.elts[0], ast.Constant):
            first = node.elts[0].value
            words = [item.value for item in node.elts if isinstance(item, ast.Constant)]
            if isinstance(first, str) and Path(first).name.startswith("python") and "-P" not in words:
                yield f"line {node.lineno}: {first}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_python_child_is_started_by_the_helper(package: str) -> None:
    modules = [path for path in sorted((ROOT / package).rglob("*.py")) if path != HELPER]
    assert modules
    found = {str(path.relative_to(ROOT)): lines for path in modules if (lines := list(python_children(path)))}
    assert found == {}, "use python_command and child_environment of edt_core.child_process"


@pytest.mark.parametrize(
    "source",
    ["run([sys.executable, '-m', 'x'])", "x = sys.executable", "run(['python3', '-c', 'y'])", "sys.path.insert(0, p)"],
)
def test_the_walk_finds_a_child_without_the_helper(source: str, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(source)
    assert list(python_children(tmp_path / "module.py"))


@pytest.mark.parametrize(
    ("component", "entry", "module"),
    [
        ("vae", ["diffusers", "AutoencoderKL"], "vae/diffusers.py"),
        ("vae", ["evil", "AutoencoderKL"], "vae/evil.py"),
        ("transformer", ["trapped_module", "EDTTransformer"], "trapped_module.py"),
        ("scheduler", ["os", "system"], "pipeline.py"),
    ],
)
def test_a_model_s_folder_brings_no_code(
    component: str, entry: list[str], module: str, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its index; diffusers before 0.42 imports what that names."""
    from jobs.models.open import load_model

    index = {
        "_class_name": "EDTPipeline",
        "transformer": ["edt_core.pipeline", "EDTTransformer"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    folder = tmp_path / "model"
    (folder / module).parent.mkdir(parents=True)
    (folder / module).write_text(f"open({str(canary)!r}, 'w')\n")
    (folder / "model_index.json").write_text(json.dumps({**index, component: entry}))
    monkeypatch.syspath_prepend(folder)  # as for somebody who is in that folder
    with pytest.raises(UserError, match="but code in a folder is not run"):
        load_model(str(folder))
    assert not canary.exists()


# A schedule's record says what the server runs, and where.


@pytest.fixture
def schedules(tmp_path: Path) -> Schedules:
    write_empty_mlflow(tmp_path / "store")
    made = Schedules.at(str(tmp_path / "store"))
    for name in ("one", "two"):
        made.put(new_schedule(name, "quickstart", [], str(tmp_path / "store"), "* * * * *", "UTC"))
    return made


def record(schedules: Schedules, name: str = "one") -> Path:
    assert schedules.folder.local is not None
    return schedules.folder.local / f"{name}.json"


def synced(schedules: Schedules) -> tuple[list[str], str]:
    """The names of schedules that a server serves, and what it says, after two looks at the folder."""

    now, told, served = datetime.now(UTC), [], []
    server = scheduler.Server(schedules, told.append, now=lambda: now)
    server.attend = served.append
    with ThreadPoolExecutor(1) as pool:
        server._sync(pool)
        server._sync(pool)
    return served, "\n".join(told)


@pytest.mark.parametrize("mode", [0o602, 0o620, 0o666, 0o777])
@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_record_that_others_can_write_is_refused(place: str, mode: int, schedules: Schedules) -> None:
    path = record(schedules)
    (path if place == "file" else path.parent).chmod(mode if place == "file" else mode | 0o700)
    served, told = synced(schedules)
    assert served == (["two"] if place == "file" else [])
    assert told.count("refused") == (1 if place == "file" else 2)  # each is told once
    assert "other users can write it" in told
    assert "chmod" in told
    with pytest.raises(UserError, match="other users can write it"):
        schedules.pause("one")  # it would be written anew, and be ours


def test_the_list_has_the_others_and_says_which_is_refused(schedules: Schedules) -> None:
    record(schedules).chmod(0o666)
    done = edt("schedule", "list", "--store", schedules.store.uri)
    assert done.returncode == 2
    assert "one is refused: " in done.stderr
    one, two = done.stdout.splitlines()[1:]
    assert {"one", "refused"} <= set(one.split())
    assert {"two", "quickstart"} <= set(two.split())


def test_a_record_that_is_a_fifo_does_not_stop_the_others(schedules: Schedules) -> None:
    path = record(schedules)
    path.unlink()
    os.mkfifo(path, 0o600)
    served, told = synced(schedules)
    assert served == ["two"]
    assert "is a FIFO, but a regular file is expected" in told


def test_a_record_of_another_user_is_refused(schedules: Schedules, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(record(schedules), 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    served, told = synced(schedules)
    assert "one" not in served
    assert "belongs to user" in told
    if os.geteuid() == 0:
        assert served == ["two"]
        schedules.remove("one")
        assert schedules.names() == ["two"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"store": "/elsewhere"}, "runs in another store, /elsewhere"),
        ({"name": "two"}, "the record of the schedule 'two'"),
    ],
)
def test_a_record_that_was_copied_here_is_refused(change: dict[str, str], message: str, schedules: Schedules) -> None:
    path = record(schedules)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    served, told = synced(schedules)
    assert served == ["two"]
    assert message in told


def test_a_store_by_another_way_is_the_same_store(schedules: Schedules, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "store")
    assert Schedules.at(str(tmp_path / "link")).read("one").name == "one"


def test_a_state_names_no_log_outside_of_the_workplace(schedules: Schedules, tmp_path: Path) -> None:
    """What a state names as a log is published in MLflow, and the file beside it is removed."""
    secret, beside = tmp_path / "id.key", tmp_path / "id.result.json"
    for path in (secret, beside):
        path.write_text("{}")
    tick = scheduler.Tick(tick=datetime.now(UTC), started=datetime.now(UTC), log=str(secret))
    schedules.write_state("one", schedules.state("one").model_copy(update={"running": tick}))
    scheduler.Server(schedules, print).attend("one")
    assert beside.exists()
    last = schedules.state("one").last
    assert last is not None
    assert last.outcome == "lost"
    assert not list((tmp_path / "store").glob("mlartifacts/**/id.key"))


def test_a_server_s_state_that_others_can_write_starts_and_stops_nothing(schedules: Schedules) -> None:
    schedules.write_state("one", schedules.state("one"))
    state = record(schedules).parent / "state" / "one.json"
    state.chmod(0o666)
    told: list[str] = []
    with contextlib.suppress(UserError):
        scheduler.Server(schedules, told.append).attend("one")
    assert "other users can write it" in "\n".join(told)

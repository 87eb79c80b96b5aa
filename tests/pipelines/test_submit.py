"""Pipelines as jobs of a real Ray cluster: what travels, following, leaving, coming back, and what is refused."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from edt_core.errors import UserError
from edt_core.store.folder import Folder
from pipelines.cluster.submission import Cluster, request_for, stopped_too_soon
from pipelines.commands.submit import _how_to_return
from pipelines.commands.workflow import show_stopped
from pipelines.config.schema import load_config
from pipelines.schedule.lease import hold, this_process
from pipelines.schedule.record import run_lease
from tests.support import small
from tests.support.processes import wait_for
from tests.support.small import SMALL

HERE, ELSEWHERE = "http://127.0.0.1:8265", "https://ray.example.org"
SECRET = "canary-8d2e11"
TOKEN = "canary-token-3b9f60d2a417"
ROOT = Path(__file__).resolve().parents[2]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def clean_environment(**variables: str) -> dict[str, str]:
    """Ours, with the token of our cluster, as a person would have it."""
    left_out = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    kept = {key: value for key, value in os.environ.items() if key not in left_out}
    return {**kept, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, **variables}


def send(token: str | None, patch: pytest.MonkeyPatch) -> None:
    """Have Ray's client send this token, which it reads once in the life of a process; None sends none."""
    headers = {"authorization": f"Bearer {token}"} if token else {}
    patch.setattr("ray.dashboard.modules.dashboard_sdk.get_auth_headers_if_auth_enabled", lambda given: headers)


@pytest.fixture
def cluster(head: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of the cluster's dashboard, to which this process sends the right token."""
    send(TOKEN, monkeypatch)
    return head


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """Address of the dashboard of a Ray cluster of our own on this machine, which asks for a token."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets in it may have 107 characters
    port, dashboard, client, agent_http, agent_grpc, metrics = free_ports(6)
    python = Path(sys.executable)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    options = {
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent_http,
        "dashboard-agent-grpc-port": agent_grpc,
        "metrics-export-port": metrics,
        "node-ip-address": "127.0.0.1",
        "temp-dir": folder,
        "num-cpus": 2,
        "object-store-memory": 256 << 20,
    }
    line = [str(python.with_name("ray")), "start", "--head", "--block", *(f"--{k}={v}" for k, v in options.items())]
    log = Path(folder) / "start.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            line,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=clean_environment(PATH=path, PYTHONPATH=str(ROOT), RAY_USAGE_STATS_ENABLED="0"),
        )
    address = f"http://127.0.0.1:{dashboard}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            Cluster(address).jobs()
        except UserError:
            return False
        return True

    try:
        with pytest.MonkeyPatch.context() as patch:
            send(TOKEN, patch)
            wait_for(answers, pause=0.2)
        yield address
    finally:
        end_processes_of(folder)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def end_processes_of(folder: str) -> None:
    """End what is left of the cluster that lives in this folder, and of no other."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if folder.encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue


def edt(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return small.edt(*arguments, cwd=cwd, env=clean_environment(**variables))


def test_the_whole_configuration_travels_and_the_entrypoint_names_no_path_of_ours() -> None:
    config = load_config("quickstart", ["train.max_steps=7"], "s3://bucket/store")
    request = request_for(config, ELSEWHERE, {})
    assert request.entrypoint == ("python -P -m pipelines.cli run config.yaml --no-overlap --store s3://bucket/store")
    assert yaml.safe_load(request.config_yaml)["train"]["max_steps"] == 7
    assert load_config_text(request.config_yaml) == config
    assert request.notes == ()


def load_config_text(text: str) -> object:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return load_config(file.name)


def test_only_what_is_no_secret_travels() -> None:
    environment = {
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ACCESS_KEY_ID": SECRET,
        "RAY_AUTH_TOKEN": SECRET,
        "MLFLOW_TRACKING_PASSWORD": SECRET,
        "HOME": SECRET,
        "MLFLOW_TRACKING_URI": "https://mlflow.example.org",
        "AWS_ENDPOINT_URL": "https://s3.example.org",
    }
    request = request_for(load_config("quickstart", [], "s3://bucket/store"), ELSEWHERE, environment)
    assert SECRET not in repr(request)
    sent = {name: value for name, value in request.variables.items() if not name.startswith("RAY_JOB_STOP")}
    assert sent == {
        "MLFLOW_TRACKING_URI": "https://mlflow.example.org",
        "AWS_ENDPOINT_URL": "https://s3.example.org",
    }


@pytest.mark.parametrize(
    "uri",
    [
        f"https://user:{SECRET}@mlflow.example.org",
        f"https://{SECRET}@mlflow.example.org",
        f"postgresql://user:{SECRET}@db/mlflow",
        f"postgresql://db/mlflow?user=x&password={SECRET}",
    ],
)
def test_a_password_in_a_uri_does_not_travel_and_that_is_told_without_it(uri: str) -> None:
    config = load_config("quickstart", [], "s3://bucket/store")
    request = request_for(config, ELSEWHERE, {"MLFLOW_TRACKING_URI": uri})
    assert SECRET not in repr(request)
    assert any("MLFLOW_TRACKING_URI may contain a password" in note for note in request.notes)


def test_places_of_this_machine_do_not_go_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    images = ["source.kind=image_folder", "source.path=photos"]
    with pytest.raises(UserError, match=re.escape("the store ./edt-store is a relative folder")):
        request_for(load_config("quickstart"), ELSEWHERE, {})
    with pytest.raises(UserError, match=re.escape("source.path photos is a relative path")):
        request_for(load_config("quickstart", images, "s3://b/s"), ELSEWHERE, {})
    shared = request_for(load_config("quickstart", [], "/mnt/shared/store"), ELSEWHERE, {})
    assert any("/mnt/shared/store on the cluster's machines" in note for note in shared.notes)
    local = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}
    request = request_for(load_config("quickstart", [], "s3://b/s"), ELSEWHERE, local)
    assert "MLFLOW_TRACKING_URI" not in request.variables
    assert any("is an address of this machine" in note for note in request.notes)
    here = request_for(load_config("quickstart", images), HERE, local)
    assert here.variables["MLFLOW_TRACKING_URI"] == local["MLFLOW_TRACKING_URI"]
    assert f"--store {tmp_path / 'edt-store'}" in here.entrypoint
    assert yaml.safe_load(here.config_yaml)["source"]["path"] == str(tmp_path / "photos")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart"], "no Ray dashboard answers at"),
        (["--list"], "no Ray dashboard answers at"),
        (["--follow", "job"], "no Ray dashboard answers at"),
        (["--stop", "job"], "no Ray dashboard answers at"),
        (["quickstart", "--set", "train.max_step=7"], "unknown configuration key"),
        (["quickstart", "--list"], "use exactly one of"),
        ([], "use exactly one of"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    done = edt("submit", *arguments, "--address", f"http://127.0.0.1:{port}", cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_is_none(tmp_path: Path) -> None:
    done = edt("submit", "--list", "--address", "ray://127.0.0.1:10001", cwd=tmp_path)
    assert done.returncode == 2
    assert "is no address of a Ray dashboard" in done.stderr


@pytest.mark.ray
def test_a_job_that_fails_gives_1_and_its_reason(cluster: str, tmp_path: Path) -> None:
    options = ["--set", "source.kind=image_folder", "--set", "source.path=/nowhere", "--store", str(tmp_path / "s")]
    done = edt("submit", "quickstart", *options, "--address", cluster, "--job-id", "fails", cwd=tmp_path)
    assert done.returncode == 1, done
    assert "submitted fails" in done.stdout
    assert "error: the source /nowhere does not exist" in done.stdout
    assert "fails FAILED: " in done.stdout
    again = edt("submit", "--follow", "fails", "--address", cluster, cwd=tmp_path)
    assert again.returncode == 1
    assert again.stdout.count("error: the source /nowhere does not exist") == 1
    assert "fails FAILED: " in again.stdout
    taken = edt("submit", "quickstart", *options, "--address", cluster, "--job-id", "fails", cwd=tmp_path)
    assert (taken.returncode, "Traceback" in taken.stderr) == (2, False)
    assert "already exists" in taken.stderr
    for verb in ("--follow", "--stop"):
        unknown = edt("submit", verb, "nobody", "--address", cluster, cwd=tmp_path)
        assert (unknown.returncode, "Traceback" in unknown.stderr) == (2, False)
        assert "nobody" in unknown.stderr


@pytest.mark.ray
def test_without_its_token_the_cluster_answers_nobody(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token in (None, "another-token-0c4d2e"):
        send(token, monkeypatch)
        done = edt("submit", "--list", "--address", head, cwd=tmp_path)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done
        assert "rejects the token" in done.stderr
        assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("speaks", [False, True], ids=["closed", "silent"])
def test_a_dashboard_that_says_nothing_is_given_up(speaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDT_ANSWER_S", "0.5")
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        if speaks:
            port.listen()
        address = f"http://127.0.0.1:{port.getsockname()[1]}"
        silence = f"no answer in 0.5 s from {address}, where a Ray dashboard was expected"
        reason = silence if speaks else f"no Ray dashboard answers at {address}"
        with pytest.raises(UserError, match=f"{reason}; start the cluster"):
            Cluster(address)


def test_the_commands_that_come_back_to_a_job_are_quoted() -> None:
    told = _how_to_return("my job", "http://host:8265/a?b=1&c")
    assert "edt submit --follow 'my job' --address 'http://host:8265/a?b=1&c'" in told
    assert "edt submit --stop 'my job' --address" in told


@pytest.mark.ray
def test_a_token_of_the_environment_is_taken(head: str, tmp_path: Path) -> None:
    """In a process of its own, where Ray reads the variables anew."""
    listing = ("submit", "--list", "--address", head)
    done = small.edt_process(*listing, cwd=tmp_path, env=clean_environment(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done


@pytest.mark.ray
def test_a_run_that_goes_on_is_not_started_again_by_a_job(cluster: str, tmp_path: Path) -> None:
    """The given address counts, whatever Ray's own variables say."""
    options = ["--store", str(tmp_path / "s"), "--address", cluster]
    with hold(Folder.at(tmp_path / "s"), run_lease("quickstart"), this_process()):
        done = edt("submit", "quickstart", *options, cwd=tmp_path, RAY_ADDRESS="http://127.0.0.1:9")
    assert done.returncode == 0, done
    assert "is in progress" in done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_a_pipeline_is_submitted_left_come_back_to_and_succeeds(cluster: str, tmp_path: Path) -> None:
    settings = [part for text in SMALL for part in ("--set", text)]
    options = ["--store", str(tmp_path / "s"), "--address", cluster, "--job-id", "small"]
    left = edt("submit", "quickstart", *settings, *options, "--detach", cwd=tmp_path)
    assert left.returncode == 0, left
    assert f"edt submit --follow small --address {cluster}" in left.stdout
    follower = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "submit", "--follow", "small", "--address", cluster],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=clean_environment(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1"),
    )
    assert follower.stdout is not None
    while "edt run quickstart" not in (line := follower.stdout.readline()):
        assert line or follower.poll() is None
    follower.send_signal(signal.SIGINT)
    rest = follower.communicate()[0]
    assert follower.returncode == 130
    assert "small continues in the cluster" in rest
    listed = edt("submit", "--list", "--address", cluster, cwd=tmp_path).stdout
    assert re.search(r"^small +quickstart +RUNNING", listed, re.MULTILINE), listed
    back = edt("submit", "--follow", "small", "--address", cluster, cwd=tmp_path)
    assert back.returncode == 0, back
    assert "12 run, 0 failed" in back.stdout
    assert "small SUCCEEDED" in back.stdout
    assert "has already ended" in edt("submit", "--stop", "small", "--address", cluster, cwd=tmp_path).stdout


def test_the_submitter_is_told_the_command_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's own, `edt run config.yaml`, is about a file that they do not have."""
    from pipelines.commands.submit import _command

    told = _command("my run.yaml", ["train.lr=0.1"], "s3://b/s", HERE)
    assert told == f"edt submit 'my run.yaml' --set train.lr=0.1 --store s3://b/s --address {HERE}"
    request = request_for(
        load_config("quickstart", [], "s3://b/s"), HERE, {}, f"{told} --set source.path=http://me:{SECRET}@h/x"
    )
    assert told in request.variables["EDT_GO_ON"]
    assert request.metadata["edt.command"] == request.variables["EDT_GO_ON"]
    assert SECRET not in str(request)
    said: list[str] = []
    monkeypatch.setenv("EDT_GO_ON", told)
    show_stopped(SimpleNamespace(freeze=lambda: None, say=lambda text, style: said.append(text)), "stopped")
    assert said == [f"\nstopped; finished work is kept. To resume:\n  {told}"]


def test_a_job_that_ray_would_kill_too_soon_is_warned() -> None:
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    ours = request_for(load_config("quickstart", [], "s3://b/s"), HERE, {}).variables
    assert stopped_too_soon({}) is None
    assert stopped_too_soon({**job, **ours}) is None
    warning = stopped_too_soon(job)
    assert warning is not None
    assert '--runtime-env-json \'{"env_vars": {"RAY_JOB_STOP_SIGNAL": "SIGINT"' in warning


def test_credentials_in_a_url_do_not_travel() -> None:
    weights = "inception.weights=https://me:secret@example.com/weights.pth"
    with pytest.raises(UserError, match=r"contains credentials in a URL.* not sent to the cluster"):
        request_for(load_config("quickstart", [weights], "s3://bucket/store"), "http://ray:8265", {})


def test_a_path_that_is_the_value_of_a_secret_is_not_sent_in_another_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records have the variable's name in its place, and the job would read images from there."""
    monkeypatch.setenv("MINIO_ACCESS_KEY", "imagenet")
    images = ["source.kind=image_folder", "source.path=s3://imagenet/train"]
    with pytest.raises(UserError, match="or the value of a secret environment variable"):
        request_for(load_config("quickstart", images, "s3://bucket/store"), "http://ray:8265", {})

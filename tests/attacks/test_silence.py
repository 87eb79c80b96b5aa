"""A server accepts the connection and says nothing: every command that asks one ends in time and says which it was."""

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edt_core.errors import UserError
from edt_core.network.answers import check_http
from edt_core.store.folder import Folder
from pipelines.cli import app

LIMIT_S = "0.4"


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """HOST:PORT of a server that accepts and is silent. What waits for it for a limit of its own ends with the test."""
    monkeypatch.setenv("EDT_ANSWER_S", LIMIT_S)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as port:
        yield f"127.0.0.1:{port.getsockname()[1]}"


def refused(*arguments: str) -> str:
    """The user's mistake that a command ends with."""
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    return str(result.exception)


def silence(place: str, what: str) -> str:
    return re.escape(f"no answer in {LIMIT_S} s from {place}, where {what} was expected; ") + ".*EDT_ANSWER_S=60"


def test_edt_submit_gives_a_silent_dashboard_up(silent: str) -> None:
    said = refused("submit", "--list", "--address", f"http://{silent}")
    assert re.match(silence(f"http://{silent}", "a Ray dashboard"), said)


@pytest.mark.parametrize("command", [("runs",), ("plan", "quickstart"), ("run", "quickstart")], ids=" ".join)
def test_a_silent_mlflow_is_given_up(
    command: tuple[str, ...], silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a Ray session starts: a light test fails where one does."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:canary-word@{silent}")
    said = refused(*command, "--store", str(tmp_path / "store"))
    assert re.match(silence(f"http://<redacted>@{silent}/health", "an MLflow server"), said)
    assert "MLFLOW_TRACKING_URI" in said


def test_a_model_of_a_silent_mlflow_is_given_up(
    silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs.commands.draw import main

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{silent}")
    monkeypatch.setattr("sys.argv", ["edt draw", "models:/edt@champion", "--out", str(tmp_path / "picture.png")])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert re.search(silence(f"http://{silent}/health", "an MLflow server"), said)


def test_a_silent_postgresql_is_given_up(silent: str, tmp_path: Path) -> None:
    pytest.importorskip("psycopg2")
    from pipelines.tracking.catalog import Catalog

    uri = f"postgresql+psycopg2://me:canary-word@{silent}/mlflow"
    for opened in (
        lambda: Catalog.existing(Folder.at(tmp_path), uri),
        lambda: Catalog.open(Folder.at(tmp_path), "", uri),
    ):
        with pytest.raises(
            UserError, match=silence(uri.replace("me:canary-word", "<redacted>"), "a PostgreSQL database")
        ):
            opened()


def test_a_silent_s3_server_is_given_up(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{silent}")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    for ask in (Folder.names, Folder.check_writable, lambda folder: folder.exists("manifest.json")):
        with pytest.raises(UserError, match=silence(f"http://{silent}", "an S3 server")):
            ask(Folder.at("s3://bucket/store"))


def test_a_silent_download_is_given_up(silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edt_core.evaluation.extractors.weights import published_weights

    monkeypatch.setenv("EDT_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=silence(f"http://{silent}/w.pth", "a file")):
        published_weights("inception", f"http://{silent}/w.pth?token=canary-word", "0" * 64)


@pytest.fixture
def hub(silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a machine whose hub is silent."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://{silent}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_silent_hub_is_given_up(hub: Path, silent: str) -> None:
    from edt_core.autoencoders.autoencoder import load_autoencoder
    from edt_core.evaluation.extractors import load_extractor

    said = "it is not complete in this machine's hub cache, "
    said += re.escape(f"and the hub at http://{silent} did not answer in {LIMIT_S} s")
    with pytest.raises(UserError, match=f"no autoencoder at nobody/vae: {said}"):
        load_autoencoder("nobody/vae")
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=f"no DINOv2 at nobody/dinov2: {said}"):
        load_extractor("dinov2", "nobody/dinov2")


def test_what_the_cache_holds_does_without_a_silent_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edt_core.autoencoders.autoencoder import _load_config

    revision = "0" * 40
    snapshot = hub / "models--nobody--vae" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (hub / "models--nobody--vae" / "refs").mkdir()
    (hub / "models--nobody--vae" / "refs" / "main").write_text(revision)
    (snapshot / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "scaling_factor": 0.5}))
    monkeypatch.setattr("diffusers.configuration_utils.HF_HUB_CACHE", str(hub), raising=False)
    assert _load_config("nobody/vae", away=True)["scaling_factor"] == 0.5


@contextmanager
def answering(pause_s: float, answer: bytes) -> Iterator[str]:
    """URL of a server that says the same to everybody, after a pause."""
    with socket.create_server(("127.0.0.1", 0)) as port:

        def serve() -> None:
            connection, _ = port.accept()
            with connection:
                connection.recv(1 << 16)
                time.sleep(pause_s)
                connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{port.getsockname()[1]}"
        thread.join(60)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",  # the rest comes later
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
    ids=["ok", "error", "slow body", "other protocol"],
)
def test_who_says_something_in_time_is_left_to_its_client(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDT_ANSWER_S", "60")
    with answering(0.2, answer) as url:
        check_http(url, "a server", "start it")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        check_http(f"http://127.0.0.1:{closed.getsockname()[1]}", "a server", "start it")


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_a_limit_that_is_none_is_told(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDT_ANSWER_S", text)
    with pytest.raises(UserError, match=f"EDT_ANSWER_S is '{text}'; it must be a number of seconds above 0"):
        check_http("http://127.0.0.1:1", "a server", "start it")


def test_a_hub_is_not_away_where_only_the_question_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client reads SSL_CERT_FILE and a SOCKS proxy, which `requests` does not know: it must be let try."""
    import requests

    from edt_core.network.hub import hub_is_away

    raised: list[Exception] = []

    def ask(*_: object, **__: object) -> None:
        raise raised[0]

    monkeypatch.setattr(requests, "get", ask)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for error, away in [
        (requests.exceptions.SSLError("self-signed certificate"), False),
        (requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support."), False),
        (requests.exceptions.ConnectionError("refused"), True),
        (requests.exceptions.ProxyError("refused"), True),
    ]:
        raised[:] = [error]
        assert hub_is_away("nobody/vae") is away, error

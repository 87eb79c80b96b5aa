"""`edt webhook`: the webhooks of an MLflow server."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support.processes import wait_for
from tests.support.servers import MlflowServer, receiver
from tests.support.small import edt


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """MLflow refuses http and loopback as receivers unless these variables allow them."""
    server = MlflowServer(
        tmp_path_factory.mktemp("mlflow"),
        MLFLOW_WEBHOOK_ALLOWED_SCHEMES="http,https",
        MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS="true",
    )
    server.start()
    yield server
    server.kill()


@pytest.mark.extern
def test_a_moved_champion_is_posted_and_the_webhook_is_tested_listed_and_removed(server: MlflowServer) -> None:
    place = ["--tracking-uri", server.uri]
    with receiver() as (url, bodies):
        added = edt("webhook", "add", "deploy", f"{url}/XXtokenXX", "--event", "model_version_alias.created", *place)
        assert added.returncode == 0, added.stderr
        (row,) = json.loads(edt("webhook", "list", "--json", *place).stdout)
        assert {key: row[key] for key in ("name", "url", "events", "status")} == {
            "name": "deploy",
            "url": url,
            "events": "model_version_alias.created",
            "status": "active",
        }
        tested = edt("webhook", "test", row["id"], *place)
        assert "delivered: the receiver answered with status 200" in tested.stdout
        client = MlflowClient(server.uri, server.uri)
        client.create_registered_model("digits")
        client.create_model_version("digits", "s3://bucket/digits")
        before = len(bodies)
        client.set_registered_model_alias("digits", "champion", "1")
        wait_for(lambda: len(bodies) > before, pause=0.1)
        posted = json.loads(bodies[-1])
        assert (posted["entity"], posted["data"]["alias"]) == ("model_version_alias", "champion")
    failed = edt("webhook", "test", row["id"], *place)
    assert (failed.returncode, failed.stderr.startswith("not delivered")) == (1, True)
    assert edt("webhook", "remove", row["id"], *place).returncode == 0
    assert "no webhooks" in edt("webhook", "list", *place).stdout
    gone = edt("webhook", "remove", row["id"], *place)
    assert gone.returncode == 2
    assert "the MLflow server refused" in gone.stderr
    assert "XX" not in added.stdout + tested.stdout + failed.stderr


@pytest.mark.extern
def test_a_server_that_forbids_the_address_is_one_message(server: MlflowServer) -> None:
    refused = edt("webhook", "add", "deploy", "ftp://host/x", "--tracking-uri", server.uri)
    assert refused.returncode == 2
    assert "the MLflow server refused" in refused.stderr
    assert "scheme" in refused.stderr


def test_a_registry_without_a_server_has_no_webhooks(tmp_path: Path) -> None:
    refused = edt("webhook", "list", "--tracking-uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert refused.returncode == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--event", "model.moved"], "unknown event 'model.moved'; use registered_model.created"),
        (["--secret-variable", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE (--secret-variable) is not set"),
    ],
)
def test_wrong_options(options: list[str], message: str) -> None:
    refused = edt("webhook", "add", "deploy", "https://host.example/x", *options)
    assert refused.returncode == 2
    assert message in refused.stderr

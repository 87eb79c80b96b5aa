"""Commands on the webhooks of MLflow's registry: the MLflow server itself posts every change of a registered model."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from edt_core.errors import UserError
from edt_core.printing.console import say
from pipelines.commands.options import DEFAULT_STORE, AsJson, StoreOption, TrackingUri, open_catalog, print_rows

if TYPE_CHECKING:
    from mlflow import MlflowClient

Result = TypeVar("Result")

EVENTS = (
    "registered_model.created",
    "model_version.created",
    "model_version_tag.set",
    "model_version_tag.deleted",
    "model_version_alias.created",
    "model_version_alias.deleted",
)
_DEFAULT_EVENTS = ["model_version.created", "model_version_alias.created"]  # a new version, and a moved champion
_COLUMNS = ("id", "name", "url", "events", "status")

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Webhooks of MLflow's registry: the MLflow server posts changes of registered models to a URL.",
)
Identifier = Annotated[str, typer.Argument(metavar="ID", help="id of the webhook, as `edt webhook list` prints it")]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="name of the webhook")],
    url: Annotated[str, typer.Argument(help="https URL that receives the events")],
    event: Annotated[
        list[str], typer.Option(help=f"event to send, repeatable: {', '.join(EVENTS)}", show_default=True)
    ] = _DEFAULT_EVENTS,
    secret_variable: Annotated[
        str | None, typer.Option(help="environment variable with the key that signs each message (HMAC)")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Add a webhook to the MLflow server.

    To keep secrets, the server needs MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY.

    \b
    Examples:
      edt webhook add deploy https://deploy.example.org/models --tracking-uri http://mlflow:5000
      edt webhook add deploy https://deploy.example.org/models --secret-variable DEPLOY_HOOK_SECRET
    """
    if unknown := [value for value in event if value not in EVENTS]:
        raise UserError(f"unknown event {unknown[0]!r}; use {', '.join(EVENTS)}")
    secret = None
    if secret_variable is not None and not (secret := os.environ.get(secret_variable)):
        raise UserError(f"the environment variable {secret_variable} (--secret-variable) is not set; export it")
    client = _server(store, tracking_uri)
    events: list[Any] = list(event)
    webhook = _call(lambda: client.create_webhook(name, url, events, secret=secret))
    say(f"webhook {webhook.webhook_id} added: {', '.join(event)} -> {_shown(url)}")
    say(f"edt webhook test {webhook.webhook_id} sends a test message")


@app.command("list")
def list_(store: StoreOption = DEFAULT_STORE, tracking_uri: TrackingUri = None, as_json: AsJson = False) -> None:
    """List the webhooks of the MLflow server.

    Of a URL, only scheme, host and port are shown: its path may be a secret.

    \b
    Examples:
      edt webhook list --json
    """
    client = _server(store, tracking_uri)
    print_rows([_row(webhook) for webhook in _webhooks(client)], _COLUMNS, as_json, "no webhooks")


@app.command("test")
def send_test(identifier: Identifier, store: StoreOption = DEFAULT_STORE, tracking_uri: TrackingUri = None) -> None:
    """Have the MLflow server send a test message; exit 1 if it is not delivered.

    \b
    Examples:
      edt webhook test 6f1c0a5e
    """
    client = _server(store, tracking_uri)
    answer = _call(lambda: client.test_webhook(identifier))
    if answer.success:
        say(f"delivered: the receiver answered with status {answer.response_status}")
        return
    reason = f"status {answer.response_status}" if answer.response_status else "no answer"
    say(f"not delivered: {reason}", err=True)
    raise typer.Exit(1)


@app.command()
def remove(identifier: Identifier, store: StoreOption = DEFAULT_STORE, tracking_uri: TrackingUri = None) -> None:
    """Remove a webhook.

    \b
    Examples:
      edt webhook remove 6f1c0a5e
    """
    client = _server(store, tracking_uri)
    _call(lambda: client.delete_webhook(identifier))
    say(f"webhook {identifier} removed")


def _server(store: str, tracking_uri: str | None) -> "MlflowClient":
    """The client of an MLflow server. Raises UserError for a database: only a server sends webhooks."""
    catalog = open_catalog(store, tracking_uri)
    if not catalog.tracking_uri.startswith(("http://", "https://")):
        raise UserError(
            "webhooks are sent by an MLflow server, and the registry here is a database without one; start a server "
            "and name it with --tracking-uri http://HOST:5000, or use notifications of runs (EDT_NOTIFY_URLS)"
        )
    return catalog.client


def _call(request: Callable[[], Result]) -> Result:
    """What a request to the server returns. Raises UserError with the server's reason."""
    from mlflow.exceptions import MlflowException

    try:
        return request()
    except MlflowException as error:
        raise UserError(f"the MLflow server refused: {str(error).splitlines()[0]}") from error


def _webhooks(client: "MlflowClient") -> list[Any]:
    webhooks: list[Any] = []
    token: str | None = None
    while True:
        page = _call(lambda: client.list_webhooks(page_token=token))
        webhooks += page
        if not (token := page.token):
            return webhooks


def _row(webhook: Any) -> dict[str, str]:
    return {
        "id": webhook.webhook_id,
        "name": webhook.name,
        "url": _shown(webhook.url),
        "events": ", ".join(f"{event.entity.value}.{event.action.value}" for event in webhook.events),
        "status": webhook.status.value.lower(),
    }


def _shown(url: str) -> str:
    from pipelines.notification import public_name

    return public_name(url)

"""Whether a Ray cluster answers at an address: asked before Ray joins it, because Ray waits minutes for a dead one."""

import os
import sys
from typing import Any

from edt_core.errors import UserError

SILENCE_S = 3.5  # without a word of gRPC in this time nobody answers
BUSY_S = 60.0  # for the answer of a server that speaks gRPC: it is alive, and may have much to do
_GREETED_S = 0.5  # for gRPC to say what it knows already
_WATCHED: list[Any] = []  # gRPC's thread that watches a channel goes on for a moment, and fails if the channel is gone
_REMEDY = "Start the cluster, give another --address or RAY_ADDRESS, or unset RAY_ADDRESS to use this machine alone."
_TOKEN_REMEDY = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the token of the cluster."
_HTTP_REMEDY = "A head listens on port 6379 as a rule; the dashboard's address (port 8265) is for `edt submit`."
_CLIENT = "ray://"
# One cheap method of each kind of server, which takes an empty request. Another kind does not implement it.
_METHODS = {
    "Ray head": "/ray.rpc.NodeInfoGcsService/CheckAlive",
    "Ray Client server": "/ray.rpc.RayletDriver/ClusterInfo",
}


def named_address(address: str | None) -> str | None:
    """The address that was given, or that of RAY_ADDRESS; None where Ray starts on this machine.

    RAY_ADDRESS goes before a given "auto", as in `ray.init`.
    """
    if address and address != "auto":
        return address
    return os.environ.get("RAY_ADDRESS") or address or None


def check_named(address: str | None = None) -> None:
    """Raise UserError within seconds where a cluster is named, by argument or RAY_ADDRESS, and does not answer.

    For the start of a command, so that nobody waits for a long listing to learn it. Without a named cluster, and in a
    process that has joined one, it does nothing, and does not import Ray.
    """
    joined = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if not joined and (named := named_address(address)) is not None:
        check_answers(named)


def check_answers(address: str, silence_s: float = SILENCE_S) -> None:
    """Raise UserError where no Ray cluster answers at an address that `ray.init` takes.

    A live cluster answers in milliseconds. Nothing is joined, and no process is left.
    """
    place = _place(address)
    if place is not None:
        _ask(address, place, "Ray Client server" if address.startswith(_CLIENT) else "Ray head", silence_s)


def _place(address: str) -> str | None:
    """HOST:PORT of the server that `ray.init` would call; None where it would call none, or Ray alone knows."""
    from ray._private.services import canonicalize_bootstrap_address

    if address.startswith(("http://", "https://")):
        raise UserError(f"{address} is no address of a Ray head: it begins with http. {_HTTP_REMEDY}")
    if address.startswith(_CLIENT):
        server = address.removeprefix(_CLIENT).partition("?")[0].rstrip("/")
        return server if ":" in server else f"{server}:10001"
    if "://" in address:
        return None
    host, _, port = address.rpartition(":")
    if address not in ("auto", "local") and not (host and port.isdecimal() and int(port) < 1 << 16):
        raise UserError(f"no Ray cluster at {address}: HOST:PORT was expected. {_REMEDY}")
    try:
        # Public functions of Ray look "auto" up only while they join.
        place = canonicalize_bootstrap_address(address)
    except (ConnectionError, ValueError) as error:
        what = "no cluster runs on this machine" if isinstance(error, ConnectionError) else "HOST:PORT was expected"
        raise UserError(f"no Ray cluster at {address}: {what}. {_REMEDY}") from error
    return None if place is None else str(place)


def _ask(address: str, place: str, kind: str, silence_s: float) -> None:
    """Call the server's method and judge what comes back."""
    import grpc
    from ray._private.gcs_utils import create_gcs_channel  # with the cluster's TLS and token, and without HTTP proxies
    from ray.exceptions import AuthenticationError

    channel = create_gcs_channel(place)
    ask = channel.unary_unary(_METHODS[kind])
    try:
        try:
            ask(b"", timeout=silence_s)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            if not _speaks_grpc(channel):
                raise UserError(
                    f"no Ray cluster answers at {_both(address, place)}: no answer in {silence_s:g} s. {_REMEDY}"
                ) from error
            ask(b"", timeout=BUSY_S)
    except AuthenticationError as error:  # of this process: it was told to send a token, and has none
        raise UserError(f"the Ray cluster at {address} was not asked: {first_line(error)}. {_TOKEN_REMEDY}") from error
    except grpc.RpcError as error:
        _judge(address, place, kind, error.code(), str(error.details()))


def _speaks_grpc(channel: Any) -> bool:
    """Whether the other side has greeted as a gRPC server does: it is alive, and the answer may come yet."""
    import grpc

    _WATCHED.append(channel)
    try:
        grpc.channel_ready_future(channel).result(_GREETED_S)
    except grpc.FutureTimeoutError:
        return False
    return True


def _judge(address: str, place: str, kind: str, code: Any, details: str) -> None:
    """Raise UserError unless an error shows that a server of this kind is at work."""
    from grpc import StatusCode

    both = _both(address, place)
    if code is StatusCode.UNAVAILABLE:
        raise UserError(f"no Ray cluster answers at {both}: {_reason(place, details)}")
    if code is StatusCode.DEADLINE_EXCEEDED:
        raise UserError(
            f"the {kind} at {both} accepts calls and answered none in {BUSY_S:g} s. See its logs, or restart it."
        )
    if code is StatusCode.UNIMPLEMENTED:
        raise UserError(
            f"what listens at {both} is no {kind}. Give HOST:6379 for a head, or ray://HOST:10001 for its Ray "
            "Client server; the numbers of the ports are Ray's defaults."
        )
    # `ray.init("auto")` finds the token of this machine by itself; with another address it does not look for it.
    if code is StatusCode.UNAUTHENTICATED and address != "auto":
        raise UserError(f"the Ray cluster at {both} rejects this process's token, or wants one. {_TOKEN_REMEDY}")


def _reason(place: str, details: str) -> str:
    """Why there was no connection, and the remedy, out of gRPC's words."""
    words = details.lower()
    host, _, port = place.rpartition(":")
    if "resolv" in words or "lookup" in words:
        return f"the name {host} does not resolve. {_REMEDY}"
    if "refused" in words:
        return f"nothing listens on port {port}. {_REMEDY}"
    if "http1" in words or "expected settings" in words:
        return f"a server of another protocol listens on port {port}. {_HTTP_REMEDY}"
    return f"{details.rpartition('last error: ')[2][:200]}. {_REMEDY}"


def _both(address: str, place: str) -> str:
    """The address as it was given, and where that leads: Ray takes this machine's own for localhost."""
    return address if address.removeprefix(_CLIENT) == place else f"{address} ({place})"


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank, or the name of its class."""
    return next((line.strip(" .") for line in str(error).splitlines() if line.strip()), type(error).__name__)

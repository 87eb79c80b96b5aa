"""Check that a Ray cluster answers at an address before Ray joins it: Ray itself waits minutes for a dead one."""

import os
import sys
from typing import Any

from edt_core.errors import UserError

SILENCE_S = 3.5  # without a gRPC response in this time, no server answers
BUSY_S = 60.0  # for the answer of a server that speaks gRPC: it is alive, and may be busy
_GREETING_S = 0.5  # for gRPC to report a greeting that has arrived
_WATCHED: list[Any] = []  # gRPC's thread that watches a channel runs on for a moment, and fails if the channel is gone
_REMEDY = "Start the cluster, set another --address or RAY_ADDRESS, or unset RAY_ADDRESS to use this machine alone."
_TOKEN_REMEDY = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the token of the cluster."
_HTTP_REMEDY = "A head usually listens on port 6379; the dashboard's address (port 8265) is for `edt submit`."
_CLIENT = "ray://"
# One cheap method of each kind of server that takes an empty request. Other kinds do not implement it.
_METHODS = {
    "Ray head": "/ray.rpc.NodeInfoGcsService/CheckAlive",
    "Ray Client server": "/ray.rpc.RayletDriver/ClusterInfo",
}


def named_address(address: str | None) -> str | None:
    """The address of the cluster, from the argument or RAY_ADDRESS; None if Ray should start on this machine.

    RAY_ADDRESS overrides the argument "auto", as in `ray.init`.
    """
    if address and address != "auto":
        return address
    return os.environ.get("RAY_ADDRESS") or address or None


def check_named(address: str | None = None) -> None:
    """Raise UserError within seconds if a cluster is named, by argument or RAY_ADDRESS, and does not answer.

    Commands call this first, so that the error comes before a long listing. If no cluster is named, or this process has
    joined one, it does nothing and does not import Ray.
    """
    joined = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if not joined and (named := named_address(address)) is not None:
        check_answers(named)


def check_answers(address: str, silence_s: float = SILENCE_S) -> None:
    """Raise UserError if no Ray cluster answers at an address that `ray.init` accepts.

    A live cluster answers in milliseconds. The check does not join the cluster and leaves no process behind.
    """
    place = _place(address)
    if place is not None:
        _check_server(address, place, "Ray Client server" if address.startswith(_CLIENT) else "Ray head", silence_s)


def _place(address: str) -> str | None:
    """HOST:PORT of the server that `ray.init` would call; None if it would call none, or only Ray knows it."""
    from ray._private.services import canonicalize_bootstrap_address

    if address.startswith(("http://", "https://")):
        raise UserError(f"{address} is not the address of a Ray head: it begins with http. {_HTTP_REMEDY}")
    if address.startswith(_CLIENT):
        server = address.removeprefix(_CLIENT).partition("?")[0].rstrip("/")
        return server if ":" in server else f"{server}:10001"
    if "://" in address:
        return None
    host, _, port = address.rpartition(":")
    if address not in ("auto", "local") and not (host and port.isdecimal() and int(port) < 1 << 16):
        raise UserError(f"no Ray cluster at {address}: HOST:PORT was expected. {_REMEDY}")
    try:
        # Ray's public functions resolve "auto" only while they join.
        place = canonicalize_bootstrap_address(address)
    except (ConnectionError, ValueError) as error:
        what = "no cluster runs on this machine" if isinstance(error, ConnectionError) else "HOST:PORT was expected"
        raise UserError(f"no Ray cluster at {address}: {what}. {_REMEDY}") from error
    return None if place is None else str(place)


def _check_server(address: str, place: str, kind: str, silence_s: float) -> None:
    """Call the server's method and check the response."""
    import grpc
    from ray._private.gcs_utils import create_gcs_channel  # with the cluster's TLS and token, and without HTTP proxies
    from ray.exceptions import AuthenticationError

    channel = create_gcs_channel(place)
    call = channel.unary_unary(_METHODS[kind])
    try:
        try:
            call(b"", timeout=silence_s)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            if not _speaks_grpc(channel):
                raise UserError(
                    f"no Ray cluster answers at {_server(address, place)}: no answer in {silence_s:g} s. {_REMEDY}"
                ) from error
            call(b"", timeout=BUSY_S)
    except AuthenticationError as error:  # this process should send a token, and has none
        raise UserError(f"the Ray cluster at {address} was not called: {first_line(error)}. {_TOKEN_REMEDY}") from error
    except grpc.RpcError as error:
        _check_status(address, place, kind, error.code(), str(error.details()))


def _speaks_grpc(channel: Any) -> bool:
    """Whether the server has sent a gRPC greeting: it is alive, and may still answer."""
    import grpc

    _WATCHED.append(channel)
    try:
        grpc.channel_ready_future(channel).result(_GREETING_S)
    except grpc.FutureTimeoutError:
        return False
    return True


def _check_status(address: str, place: str, kind: str, code: Any, details: str) -> None:
    """Raise UserError unless the status of a failed call shows that a server of this kind is running."""
    from grpc import StatusCode

    server = _server(address, place)
    if code is StatusCode.UNAVAILABLE:
        raise UserError(f"no Ray cluster answers at {server}: {_reason(place, details)}")
    if code is StatusCode.DEADLINE_EXCEEDED:
        raise UserError(
            f"the {kind} at {server} accepts calls but answered none in {BUSY_S:g} s. Check its logs, or restart it."
        )
    if code is StatusCode.UNIMPLEMENTED:
        raise UserError(
            f"the server at {server} is not a {kind}. Use HOST:6379 for a head, or ray://HOST:10001 for its Ray Client "
            "server; these ports are Ray's defaults."
        )
    # `ray.init("auto")` finds the token of this machine; with another address it does not look for one.
    if code is StatusCode.UNAUTHENTICATED and address != "auto":
        raise UserError(f"the Ray cluster at {server} rejects this process's token, or requires one. {_TOKEN_REMEDY}")


def _reason(place: str, details: str) -> str:
    """Why the connection failed, and the remedy, from gRPC's details."""
    text = details.lower()
    host, _, port = place.rpartition(":")
    if "resolv" in text or "lookup" in text:
        return f"the name {host} does not resolve. {_REMEDY}"
    if "refused" in text:
        return f"nothing listens on port {port}. {_REMEDY}"
    if "http1" in text or "expected settings" in text:
        return f"a server of another protocol listens on port {port}. {_HTTP_REMEDY}"
    return f"{details.rpartition('last error: ')[2][:200]}. {_REMEDY}"


def _server(address: str, place: str) -> str:
    """The address, and the server it leads to if that differs: Ray replaces localhost with this machine's address."""
    return address if address.removeprefix(_CLIENT) == place else f"{address} ({place})"


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not blank, or the name of its class."""
    return next((line.strip(" .") for line in str(error).splitlines() if line.strip()), type(error).__name__)

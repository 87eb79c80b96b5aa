"""A model on Ray Serve: start it, wait until it is ready, and stop it without losing a request."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edt_core.errors import UserError
from jobs.runtime.cluster import is_own, require
from jobs.runtime.loopback import grpc_on_loopback
from jobs.serve.app import BusyError, Gate, Limits, make_app
from jobs.serve.replica import Pictures, Refused, Replica, Status
from jobs.serve.version import VersionName

_APP, _REPLICAS = "edt", "Replica"
_FRONT_REQUESTS = 1_000  # that the HTTP process takes at once; it does nothing but wait for replicas
_PAUSE_SECONDS = 0.2
_ROUTE_AGAIN_SECONDS = 0.05  # between looks of a waiting request for room; by default 0.5, while replicas are idle
_FLUSH_SECONDS = 0.5  # in which the proxy passes on the end of the last answers
INSTALL = "pip install 'edt-pipeline[serve]'"


@dataclass(frozen=True)
class Options:
    """What is served, where, and by how much. With `num_gpus` 0, replicas compute on `num_cpus` CPUs each."""

    model: str
    tracking_uri: str
    host: str
    port: int
    limits: Limits
    batch_size: int
    max_queue: int
    poll_seconds: float
    num_replicas: int
    num_cpus: float
    num_gpus: float


def check_installed() -> None:
    """Raise UserError if Ray Serve's packages are missing."""
    try:
        from ray import serve
    except ImportError as error:
        raise UserError(f"edt serve needs Ray Serve, which is not complete here ({error}); {INSTALL}") from error
    del serve


class _Replicas:
    """The replicas as a backend: a call waits in the queue of Ray Serve, or is refused by it."""

    def __init__(self) -> None:
        from ray import serve

        self._handle: Any = serve.get_deployment_handle(_REPLICAS, app_name=_APP)

    async def sample(self, classes: Sequence[int | str], seed: int, settings: Mapping[str, Any]) -> Pictures | Refused:
        answer: Pictures | Refused = await self._call("sample", list(classes), seed, dict(settings))
        return answer

    async def status(self) -> Status:
        status: Status = await self._call("status")
        return status

    async def _call(self, method: str, *arguments: Any) -> Any:
        from ray.serve.exceptions import BackPressureError

        try:
            return await getattr(self._handle, method).remote(*arguments)
        except BackPressureError as error:
            raise BusyError from error


def application(options: Options) -> Any:
    """The application of Ray Serve: the HTTP process, and the replicas that it calls."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    limits, gate, alone = options.limits, Gate(), is_own()

    def build() -> Any:
        return make_app(_Replicas(), limits, gate)

    @serve.ingress(build)
    class Front:
        def __init__(self, replicas: Any) -> None:
            """The replicas are part of the application; `build` finds them by name."""
            if alone:
                grpc_on_loopback()

        async def drain(self) -> None:
            await gate.drain()

    deployment: Any = serve.deployment
    routing: dict[str, Any] = {"max_backoff_s": _ROUTE_AGAIN_SECONDS}
    replicas = deployment(Replica).options(
        name=_REPLICAS,
        num_replicas=options.num_replicas,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        max_ongoing_requests=2 * options.batch_size,  # one batch runs while the next one fills
        max_queued_requests=options.max_queue,
        request_router_config=RequestRouterConfig(**routing),
    )
    front = deployment(Front).options(
        name="Front", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=_FRONT_REQUESTS
    )
    arguments = options.model, options.tracking_uri, options.batch_size, options.poll_seconds
    return front.bind(replicas.bind(*arguments, options.num_cpus, options.num_gpus, alone))


@contextmanager
def serving(options: Options) -> Iterator[VersionName]:
    """Serve in the Ray session of this process; the version once it is loaded.

    On leaving, also by an exception: new requests are refused, those that run are answered, and Ray Serve is shut down
    unless the session is one of our own, which the caller shuts down.
    Raises UserError if the model cannot be loaded, or the cluster already serves something.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if running := sorted(serve.status().applications):
        raise UserError(
            f"Ray Serve already runs {', '.join(running)} on this cluster; stop it first (serve shutdown), or use "
            "another cluster"
        )
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": options.host, "port": options.port})
        front = serve.run(application(options), name=_APP, route_prefix="/")
        version = _loaded()
        try:
            yield version
        finally:
            front.drain.remote().result()
            time.sleep(_FLUSH_SECONDS)
    finally:
        if not is_own():  # a session of our own ends as a whole
            serve.shutdown()


def _loaded() -> VersionName:
    """The version that a replica has loaded. Raises UserError with the reason if it has none."""
    from ray import serve

    handle = serve.get_deployment_handle(_REPLICAS, app_name=_APP)
    status: Status = handle.status.remote().result()
    if status.version is None:
        raise UserError(status.problem or "no version was loaded")
    return status.version


def wait_for_interrupt() -> None:
    """Return never: Ctrl-C and SIGTERM raise KeyboardInterrupt here."""
    while True:
        time.sleep(_PAUSE_SECONDS)


def resources(device: str, num_replicas: int | None, num_cpus: float | None) -> tuple[int, float, float]:
    """Replicas, and CPUs and GPUs of each, of the Ray session: one replica a GPU, or without GPUs one with all CPUs.

    `device` is "auto", "cpu" or "cuda". Raises UserError for a GPU that Ray does not have, and for more than there is.
    """
    import ray

    has = ray.cluster_resources()
    gpus = int(has.get("GPU", 0)) if device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise UserError("--device is cuda, but Ray finds no GPU; leave --device out, or use cpu")
    replicas = num_replicas or gpus or 1
    share = 1.0 if gpus else max(1.0, has.get("CPU", 1) // replicas)
    cpus, of_gpu = num_cpus or share, 1.0 if gpus else 0.0
    require("edt serve", CPU=replicas * cpus, GPU=replicas * of_gpu)
    return replicas, cpus, of_gpu

"""The HTTP application: requests are checked, handed to the replicas, and answered as pictures.

It runs without Ray too: a `Backend` is anything that samples.
"""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

from jobs.serve.pictures import MEDIA_TYPES, npz, png
from jobs.serve.replica import Pictures, Refused, Status

if TYPE_CHECKING:
    from fastapi import FastAPI, Response
    from prometheus_client import CollectorRegistry
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_STATUS_SECONDS = 1.0  # a replica whose queue is full does not answer at once; then its last status is reported


class BusyError(Exception):
    """The queue of the replicas is full."""


class Backend(Protocol):
    """What samples: the replicas of a model."""

    async def sample(self, classes: Sequence[int | str], seed: int, settings: Mapping[str, Any]) -> Pictures | Refused:
        """The pictures of a request. Raises BusyError if the queue is full."""

    async def status(self) -> Status:
        """The status of a replica. Raises BusyError if the queue is full."""


@dataclass(frozen=True)
class Limits:
    """The largest request that is accepted."""

    labels: int
    steps: int


class SampleRequest(BaseModel):
    """Images to sample: one for each label. Without settings, the model samples as it was evaluated."""

    model_config = ConfigDict(extra="forbid")

    labels: list[StrictInt | StrictStr] = Field(
        min_length=1, description="a class for each image, by index or name", examples=[[3, 1]]
    )
    seed: StrictInt = Field(0, ge=0, lt=1 << 62, description="image i depends only on (seed, i) and its class")
    num_inference_steps: StrictInt | None = Field(None, ge=2, description="sampling steps")
    cfg_scale: StrictFloat | StrictInt | None = Field(None, ge=1, description="guidance scale, 1 for no guidance")
    format: Literal["png", "npz"] = Field("png", description="one PNG with all images, or arrays for numpy.load")

    def settings(self) -> dict[str, Any]:
        """The settings of the sampler that were given."""
        values = {"num_inference_steps": self.num_inference_steps, "cfg_scale": self.cfg_scale}
        return {name: value for name, value in values.items() if value is not None}


class Health(BaseModel):
    """What is served. `problem`: why the registry or its newest version could not be read; the old one stays in use."""

    ready: bool
    model: str | None = None
    version: str | None = None
    digest: str | None = None
    problem: str | None = None


@dataclass
class Gate:
    """Counts requests that run; closed, it lets no new one in."""

    running: int = 0
    closed: bool = False

    async def drain(self) -> None:
        """Close, and return when no request runs."""
        self.closed = True
        while self.running:
            await asyncio.sleep(0.05)


@dataclass
class Counters:
    """What /metrics reports, in the names of Prometheus."""

    registry: "CollectorRegistry"
    requests: Any = field(init=False)
    rejected: Any = field(init=False)
    images: Any = field(init=False)
    running: Any = field(init=False)
    seconds: Any = field(init=False)

    def __post_init__(self) -> None:
        from prometheus_client import Counter, Gauge, Summary

        own = self.registry
        self.requests = Counter("edt_serve_requests", "requests by status", ["status"], registry=own)
        self.rejected = Counter("edt_serve_rejected", "requests refused because the queue was full", registry=own)
        self.images = Counter("edt_serve_images", "images in answers", registry=own)
        self.running = Gauge("edt_serve_running", "requests that wait or are sampled", registry=own)
        self.seconds = Summary("edt_serve_seconds", "seconds from request to answer with images", registry=own)

    def retry_seconds(self) -> int:
        """Seconds after which a refused client may try again: the mean time of an answer, at least 1."""
        values = {sample.name: sample.value for metric in self.seconds.collect() for sample in metric.samples}
        count, total = values["edt_serve_seconds_count"], values["edt_serve_seconds_sum"]
        return max(1, math.ceil(total / count)) if count else 1


class Service:
    """Answers requests of one backend."""

    def __init__(self, backend: Backend, limits: Limits, gate: Gate) -> None:
        from prometheus_client import CollectorRegistry

        self.backend, self.limits, self.gate = backend, limits, gate
        self.counters = Counters(CollectorRegistry())
        self.counters.running.set_function(lambda: gate.running)
        self._last = Status(None, None)

    async def sample(self, request: SampleRequest) -> "Response":
        """A picture, or a response that says what is wrong with the request."""
        from fastapi import Response

        if message := self._beyond_limits(request):
            return _problem(400, message)
        started = time.monotonic()
        try:
            answer = await self.backend.sample(request.labels, request.seed, request.settings())
        except BusyError:
            self.counters.rejected.inc()
            return self.unavailable("the queue is full; try again later")
        if isinstance(answer, Refused):
            return self.unavailable(answer.message) if answer.yet else _problem(400, answer.message)
        self._last = Status(answer.version, self._last.problem)
        content = await asyncio.to_thread(_encoded, answer, request.format)
        self.counters.images.inc(len(answer.labels))
        self.counters.seconds.observe(time.monotonic() - started)
        headers = {
            "X-EDT-Model": answer.version.name,
            "X-EDT-Version": answer.version.number,
            "X-EDT-Digest": answer.version.digest,
        }
        return Response(content, media_type=MEDIA_TYPES[request.format], headers=headers)

    async def health(self) -> Health:
        """What is served now; under full load, what the last answer was made by."""
        with suppress(BusyError, TimeoutError):
            self._last = await asyncio.wait_for(self.backend.status(), _STATUS_SECONDS)
        version, problem = self._last.version, self._last.problem
        if version is None:
            return Health(ready=False, problem=problem)
        ready = not self.gate.closed
        return Health(ready=ready, model=version.name, version=version.number, digest=version.digest, problem=problem)

    def _beyond_limits(self, request: SampleRequest) -> str | None:
        if (count := len(request.labels)) > self.limits.labels:
            return f"{count} labels in one request; the most is {self.limits.labels}; send several requests"
        if (steps := request.num_inference_steps or 0) > self.limits.steps:
            return f"num_inference_steps is {steps}; the most is {self.limits.steps}"
        return None

    def unavailable(self, message: str) -> "Response":
        """The answer to a request that may be sent again later."""
        return _problem(503, message, {"Retry-After": str(self.counters.retry_seconds())})


class Gated:
    """ASGI middleware: counts requests for images to their last byte; refuses them at a closed gate."""

    def __init__(self, app: "ASGIApp", service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["path"] != "/sample":
            await self._app(scope, receive, send)
            return
        gate, requests = self._service.gate, self._service.counters.requests

        async def counted(message: "Message") -> None:
            if message["type"] == "http.response.start":
                requests.labels(message["status"]).inc()
            await send(message)

        if gate.closed:
            await self._service.unavailable("the server is stopping")(scope, receive, counted)
            return
        gate.running += 1
        try:
            await self._app(scope, receive, counted)
        finally:
            gate.running -= 1


def make_app(backend: Backend, limits: Limits, gate: Gate) -> "FastAPI":
    """The application of a backend: POST /sample, GET /health, /metrics, /docs and /openapi.json."""
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    service = Service(backend, limits, gate)
    app = FastAPI(title="edt serve", description="Images of a registered diffusion transformer.")
    app.add_middleware(Gated, service=service)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _problem(422, "; ".join(_sentence(one) for one in error.errors()))

    pictures = {"content": {kind: {} for kind in MEDIA_TYPES.values()}, "description": "the images"}
    problem = {"content": {"application/json": {"example": {"detail": "what is wrong"}}}}
    responses: dict[int | str, dict[str, Any]] = {
        200: pictures,
        400: {**problem, "description": "a class, setting or number that the model or this server does not have"},
        422: {**problem, "description": "a body of another form"},
        503: {**problem, "description": "the queue is full, or the server is stopping; Retry-After has seconds"},
    }

    @app.post("/sample", response_class=Response, responses=responses)
    async def sample(request: SampleRequest) -> Response:
        """Sample one image for each label."""
        return await service.sample(request)

    @app.get("/health", response_model=Health)
    async def health() -> Response:
        """Whether a version is loaded, and which: status 200, or 503 if there is none or the server is stopping."""
        from fastapi.responses import JSONResponse

        state = await service.health()
        return JSONResponse(state.model_dump(), 200 if state.ready else 503)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters in the text format of Prometheus."""
        return Response(generate_latest(service.counters.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _encoded(answer: Pictures, form: str) -> bytes:
    return png(answer.images) if form == "png" else npz(answer.images, answer.labels)


def _problem(status: int, message: str, headers: Mapping[str, str] | None = None) -> "Response":
    from fastapi.responses import JSONResponse

    return JSONResponse({"detail": message}, status, dict(headers or {}))


def _sentence(error: Mapping[str, Any]) -> str:
    """One mistake in a body, with the place of it."""
    place = ".".join(str(part) for part in error["loc"] if part != "body")
    return f"{place or 'body'}: {error['msg']}"

"""Pipelines as jobs of a Ray cluster: submit them over HTTP to its dashboard, follow, stop and list them.

A job gets the whole validated configuration as `config.yaml` in its working directory, and a few environment variables
without secrets. The cluster's own environment must have the package and the credentials of store and MLflow. Ray reads
the token of a cluster with token authentication from the environment (RAY_AUTH_MODE, RAY_AUTH_TOKEN).
"""

import asyncio
import json
import logging
import os
import shlex
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from edt_core.errors import UserError
from edt_core.evaluation.extractors import PUBLISHED_SPACES
from edt_core.network.answers import answer_seconds, check_connects, no_answer
from edt_core.printing.redaction import redacted, redacted_values
from edt_core.store.folder import Folder

if TYPE_CHECKING:
    from pipelines.config.schema import PipelineConfig

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TRAVELS = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Ray's defaults are SIGTERM and 3 s. Then SIGKILL hits a training that still writes a checkpoint.
_RAY_WAIT_S = 3
_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
_STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", _WAIT: "600"}
_JOB_OF_RAY = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the entrypoint of a job
RESUME_VARIABLE = "EDT_GO_ON"  # in a job's environment: the submitter's command that resumes it
_COMMAND = "edt.command"  # the same command in the job's metadata
_PATHS = (("source", "path"), ("autoencoder", "pretrained"), *((space, "weights") for space in PUBLISHED_SPACES))
_RECONNECTS = 5
_NO_ADDRESS = f"{{!r}} is no address of a Ray dashboard; use one such as {DEFAULT_ADDRESS}"
_BUSY_SECONDS = 120.0
_DASHBOARD = "a Ray dashboard"
_NO_DASHBOARD = "start the cluster with its dashboard, forward its port (8265), or set another --address"


@dataclass(frozen=True)
class Request:
    """The job of one pipeline, as submitted to the cluster."""

    entrypoint: str
    config_yaml: str
    variables: Mapping[str, str]
    metadata: Mapping[str, str]
    notes: tuple[str, ...]  # for the person who submits it


def request_for(
    config: "PipelineConfig", address: str, environment: Mapping[str, str], command: str | None = None
) -> Request:
    """The job of a pipeline on the cluster at this address. Raises UserError if the configuration cannot work there.

    `command` is the command with which the submitter resumes after a stop.
    """
    from pipelines.config.schema import as_yaml

    here = urlsplit(address).hostname in _LOOPBACK
    config, notes = _with_absolute_paths(config, here)
    variables, unsent = _variables(environment, here)
    line = ["python", "-P", "-m", "pipelines.cli", "run", "config.yaml", "--no-overlap", "--store", config.store]
    metadata = {"edt.pipeline": config.name, "edt.store": config.store}
    if command is not None:
        variables[RESUME_VARIABLE] = metadata[_COMMAND] = redacted(command)
    values = config.model_dump(mode="json")
    if redacted_values(values) != values:
        raise UserError(
            "the configuration contains credentials in a URL or the value of a secret environment variable, which are "
            "not sent to the cluster; set them in the cluster's own environment, or move the file to a place that the "
            "cluster reads without them"
        )
    return Request(shlex.join(line), as_yaml(config), {**variables, **_STOPPING}, metadata, (*notes, *unsent))


def _with_absolute_paths(config: "PipelineConfig", here: bool) -> tuple["PipelineConfig", list[str]]:
    """The configuration with absolute paths, and notes: the job starts in another folder, maybe on another machine."""
    store = config.store
    if "://" not in store and not here and not Path(store).is_absolute():
        raise UserError(
            f"the store {store} is a relative folder, but the cluster is on other machines; use a URI such as "
            "--store s3://bucket/store, or the absolute path of a folder that all its machines share"
        )
    values = config.model_dump()
    values["store"] = Folder.at(store).uri
    for section, field in _PATHS:
        text = values.get(section, {}).get(field)
        if isinstance(text, str) and "://" not in text and not Path(text).is_absolute() and Path(text).exists():
            if not here:
                raise UserError(
                    f"{section}.{field} {text} is a relative path, but the cluster is on other machines; use a URI, or "
                    f"an absolute path that all its machines share, such as --set {section}.{field}=/shared/{text}"
                )
            values[section][field] = str(Path(text).absolute())
    notes = [] if "://" in store else [f"the store is the folder {values['store']} on the cluster's machines"]
    return type(config).model_validate(values), notes


def _variables(environment: Mapping[str, str], here: bool) -> tuple[dict[str, str], list[str]]:
    """The environment variables for the job, and notes on those that are not sent. No value contains a secret."""
    sent, notes = {}, []
    for name in TRAVELS:
        if not (value := environment.get(name)):
            continue
        parts = urlsplit(value)
        if parts.query or "@" in parts.netloc or redacted_values(value) != value:
            notes.append(f"{name} may contain a password and is not sent; set it in the cluster's own environment")
        elif not here and (parts.hostname in _LOOPBACK or parts.scheme in ("sqlite", "file")):
            notes.append(f"{name} is an address of this machine and is not sent; the cluster uses its own environment")
        else:
            sent[name] = value
    return sent, notes


def stopped_too_soon(environment: Mapping[str, str]) -> str | None:
    """A warning in a Ray job that is killed before a training can write its checkpoint; None otherwise."""
    if _JOB_OF_RAY not in environment or _WAIT in environment:
        return None
    variables = json.dumps({"env_vars": _STOPPING})
    return (
        f"Ray kills this job {_RAY_WAIT_S} s after a request to stop, and training since the last checkpoint is "
        f"lost; submit it with `edt submit`, or with --runtime-env-json '{variables}'"
    )


class Cluster:
    """The jobs of the Ray cluster with its dashboard at an address. Raises UserError if no dashboard answers."""

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise UserError(_NO_ADDRESS.format(address))
        self.address = address.rstrip("/")
        self._check_answers()  # before the import below, which takes seconds
        logging.getLogger("ray").setLevel(logging.ERROR)
        from ray.job_submission import JobSubmissionClient

        with self._clear_errors(), _without_addresses():
            self.client = JobSubmissionClient(self.address)
        # Ray's client has no time limit. It is long, because some requests start a process in the cluster.
        self.client._do_request = partial(self.client._do_request, timeout=_BUSY_SECONDS)  # type: ignore[method-assign]

    def _check_answers(self) -> None:
        """Raise UserError if nothing answers in time: Ray's client would wait forever for a silent server.

        Any answer is accepted here; Ray's client checks it.
        """
        import requests

        def request() -> None:
            requests.get(f"{self.address}/api/version", timeout=answer_seconds(), stream=True).close()

        try:
            check_connects(request, self.address, _DASHBOARD, _NO_DASHBOARD)  # requests has no time limit for DNS
        except UserError:
            raise
        except requests.exceptions.Timeout as error:
            raise no_answer(self.address, _DASHBOARD, _NO_DASHBOARD) from error
        except requests.exceptions.ConnectionError as error:
            raise UserError(f"no Ray dashboard answers at {self.address}; {_NO_DASHBOARD}") from error
        except (requests.exceptions.RequestException, ValueError) as error:
            raise UserError(_NO_ADDRESS.format(self.address)) from error

    def submit(self, request: Request, job_id: str | None) -> str:
        """Start the job and return its id."""
        with tempfile.TemporaryDirectory(prefix="edt-submit-") as folder, self._clear_errors():
            (Path(folder) / "config.yaml").write_text(request.config_yaml, encoding="utf-8")
            return str(
                self.client.submit_job(
                    entrypoint=request.entrypoint,
                    submission_id=job_id,
                    runtime_env={"working_dir": folder, "env_vars": dict(request.variables)},
                    metadata=dict(request.metadata),
                )
            )

    def follow(self, job_id: str, write: Callable[[str], None]) -> tuple[str, str]:
        """Write the job's log from its start to its end; return the job's status and Ray's message.

        After a broken connection, writing continues at the same place.
        """
        with self._clear_errors():
            self.client.get_job_info(job_id)
            asyncio.run(self._follow(job_id, write))
            while not (info := self.client.get_job_info(job_id)).status.is_terminal():
                time.sleep(0.5)
            return str(info.status), str(info.message or "")

    def stop(self, job_id: str) -> bool:
        """Request that a job stops. Returns False if it has already ended."""
        with self._clear_errors():
            return bool(self.client.stop_job(job_id))

    def resume_command(self, job_id: str) -> str | None:
        """The command that resumes a job after its end; None if the submitter recorded none."""
        with self._clear_errors():
            return (self.client.get_job_info(job_id).metadata or {}).get(_COMMAND)

    def jobs(self) -> list[dict[str, Any]]:
        """The pipelines that were submitted to this cluster, newest first."""
        with self._clear_errors():
            jobs = [(job, job.metadata or {}) for job in self.client.list_jobs()]
        return [
            {
                "job": job.submission_id,
                "pipeline": details["edt.pipeline"],
                "store": details.get("edt.store"),
                "status": str(job.status),
                "started": _time(job.start_time),
                "ended": _time(job.end_time),
                "message": job.message,
            }
            for job, details in sorted(jobs, key=lambda pair: -(pair[0].start_time or 0))
            if "edt.pipeline" in details
        ]

    async def _follow(self, job_id: str, write: Callable[[str], None]) -> None:
        written = 0
        for attempt in range(_RECONNECTS):
            seen = 0
            try:
                async for text in _tail(self.client, job_id):
                    if seen + len(text) > written:
                        write(text[max(0, written - seen) :])
                        written = seen + len(text)
                    seen += len(text)
                return
            except (RuntimeError, OSError):
                if attempt == _RECONNECTS - 1:
                    raise
                await asyncio.sleep(1.0)

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        """Turn errors of Ray's client into UserError."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except UserError:
            raise
        except AuthenticationError as error:
            raise UserError(
                f"the cluster at {self.address} rejects the token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH to the token of the cluster"
            ) from error
        except (ConnectionError, OSError) as error:
            raise UserError(f"no Ray dashboard answers at {self.address}; {_NO_DASHBOARD}") from error
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the cluster at {self.address} rejected the request: {_reason(error)}") from error


def _tail(client: Any, job_id: str) -> AsyncIterator[str]:
    tail: AsyncIterator[str] = client.tail_job_logs(job_id)
    return tail


@contextmanager
def _without_addresses() -> Iterator[None]:
    """Unset the variables that Ray's client prefers to its address argument."""
    variables = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(variables)


def _reason(error: Exception) -> str:
    """The last line of the cluster's message, which may begin with a traceback."""
    text = str(error).strip().removesuffix(".").replace("\\n", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]  # Ray adds a full stop after a traceback
    return lines[-1][:500] if lines else type(error).__name__


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")

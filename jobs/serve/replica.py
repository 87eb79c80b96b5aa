"""A replica of a served model: one device, the version that is in use, and the batches of all its requests.

Shapes: N images, S image size.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edt_core.config import ChainConfig
from edt_core.errors import UserError
from jobs.runtime.loopback import grpc_on_loopback
from jobs.serve.batching import Batcher
from jobs.serve.follow import Follower
from jobs.serve.version import ImageSpec, ServedVersion, VersionName, find_version, load_version


@dataclass(frozen=True)
class Pictures:
    """The images of a request, uint8 [N, S, S, 3], their labels [N], and the version that made them."""

    images: NDArray[np.uint8]
    labels: list[int]
    version: VersionName


@dataclass(frozen=True)
class Refused:
    """Why a request has no images, in one message: a mistake of the client, or no model `yet`."""

    message: str
    yet: bool = False


@dataclass(frozen=True)
class Status:
    """The version that a replica uses, None if there is none yet, and the reason of the last failed check."""

    version: VersionName | None
    problem: str | None


class Drawing:
    """Images of the present version of a follower. Requests of equal version and settings share batches of `size`."""

    def __init__(self, follower: Follower[ServedVersion], size: int, num_cpus: float) -> None:
        self.follower, self._size, self._num_cpus = follower, size, num_cpus
        self._batches: Batcher[ImageSpec, NDArray[np.uint8]] = Batcher(self._run, size)

    async def sample(self, classes: Sequence[int | str], seed: int, settings: Mapping[str, Any]) -> Pictures | Refused:
        """Image i is of class i and of the noise of (seed, i), whatever else is in its batches.

        All images of a request are of one version, also if another one is loaded meanwhile.
        """
        version = self.follower.current
        if version is None:
            return Refused(self.follower.problem or "no version of the model is loaded yet", yet=True)
        try:
            labels, chain = version.labels(classes), version.chain(settings)
            specs = [ImageSpec(label, seed, index) for index, label in enumerate(labels)]
            results = self._batches.submit((version, chain), specs)
            images = await asyncio.gather(*map(asyncio.wrap_future, results))
        except UserError as error:
            return Refused(str(error))
        return Pictures(np.stack(images), labels, version.name)

    def status(self) -> Status:
        """What is in use."""
        current = self.follower.current
        return Status(None if current is None else current.name, self.follower.problem)

    def close(self) -> None:
        """End the threads, after what was submitted."""
        self.follower.stop()
        self._batches.close()

    def _run(self, key: Any, specs: Sequence[ImageSpec]) -> list[NDArray[np.uint8]]:
        from jobs.runtime.cluster import use_threads

        version: ServedVersion
        chain: ChainConfig
        version, chain = key
        use_threads(self._num_cpus)  # the number is one of this thread's own
        return version.draw(chain, specs, self._size)


class Replica:
    """The deployment: a `Drawing` that follows an alias of MLflow. Its constructor raises nothing that is a problem of
    the model, because Ray Serve would repeat it; `status` has the problem.
    """

    def __init__(
        self,
        model: str,
        tracking_uri: str,
        size: int,
        poll_seconds: float,
        num_cpus: float,
        num_gpus: float,
        on_loopback: bool,
    ) -> None:
        import mlflow

        from edt_core.precision import use_precision

        if on_loopback:
            grpc_on_loopback()
        mlflow.set_tracking_uri(tracking_uri)
        use_precision("fp32")
        follower = Follower(partial(find_version, model), partial(_load, num_gpus=num_gpus))
        self._drawing = Drawing(follower, size, num_cpus)
        follower.check()
        follower.start(poll_seconds)

    async def sample(self, classes: Sequence[int | str], seed: int, settings: Mapping[str, Any]) -> Pictures | Refused:
        """As `Drawing.sample`."""
        return await self._drawing.sample(classes, seed, settings)

    async def status(self) -> Status:
        """As `Drawing.status`."""
        return self._drawing.status()


def _load(version: VersionName, num_gpus: float) -> ServedVersion:
    from jobs.runtime.devices import device_name

    return load_version(version, device_name(num_gpus))

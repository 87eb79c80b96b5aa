"""Follow an alias of the registry: the version it points at, loaded beside the present one, then used instead."""

import logging
import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from jobs.runtime.failure import explained
from jobs.serve.version import VersionName

_log = logging.getLogger(__name__)


class Named(Protocol):
    """A loaded version."""

    name: VersionName


Loaded = TypeVar("Loaded", bound=Named)


class Follower(Generic[Loaded]):
    """The version of an alias in memory. `find` looks it up, and `load` loads it.

    A version that cannot be loaded, and a registry that does not answer, leave the present version in use; `problem`
    is the reason until a check succeeds. Before the first version is loaded, `current` is None.
    """

    def __init__(self, find: Callable[[], VersionName], load: Callable[[VersionName], Loaded]) -> None:
        self._find, self._load = find, load
        self._stopped = threading.Event()
        self.current: Loaded | None = None
        self.problem: str | None = None

    def check(self) -> None:
        """Look the version up, and load it if it is another one than the present. Raises nothing."""
        try:
            name = self._find()
            if self.current is None or name != self.current.name:
                self.current = self._load(name)
                _log.info("serving %s", name.label)
            self.problem = None
        except Exception as error:
            problem = explained(error).cause
            if problem != self.problem:
                _log.warning("%s", problem)
            self.problem = problem

    def start(self, seconds: float) -> None:
        """Check every `seconds` in a thread that ends with the process or with `stop`."""

        def follow() -> None:
            while not self._stopped.wait(seconds):
                self.check()

        threading.Thread(target=follow, name="follow", daemon=True).start()

    def stop(self) -> None:
        """End the thread after a check that is running."""
        self._stopped.set()

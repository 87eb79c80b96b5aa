"""A workflow is plain Python that calls steps; a call returns a future, and futures go into the next calls."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edt_core.artifact import Artifact, Source
from edt_core.config import Section
from jobs.cluster import cause_of
from jobs.progress import Board
from jobs.verb import Verb
from pipelines.artifacts import Store
from pipelines.catalog import Catalog
from pipelines.step import StepFuture, StepTask, input_fingerprints, run_step
from pipelines.terminal import Terminal

_POLL_S = 0.5


@dataclass
class Workflow:
    """One run of a workflow: submits what is not committed yet, and knows what became of every step."""

    store: Store
    catalog: Catalog
    run_id: str
    terminal: Terminal
    connect: Callable[[], bool]  # joins or starts Ray when the first step has to run; True for a shared cluster
    futures: dict[str, StepFuture] = field(default_factory=dict)
    failures: dict[str, BaseException] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)
    _board: Any = None
    _shared: bool = False

    def step(self, name: str, verb: Verb, config: Section, **inputs: StepFuture | Source) -> StepFuture:
        """Reuse the artifact of this fingerprint, or have it made when its inputs are. Never waits."""
        fingerprint = verb.fingerprint(config, input_fingerprints(inputs))
        needs = tuple(item.name if isinstance(item, StepFuture) else "source" for item in inputs.values())
        found = self.store.find(verb.kind, fingerprint, self.terminal.warn)
        if found is not None:
            verb.accept(config, found.counts)
            future = StepFuture(name, verb.kind, fingerprint, needs, artifact=found)
            self.terminal.reused(name, fingerprint)
        else:
            ref = self._submit(StepTask(name, verb, config, fingerprint, *self._surroundings()), inputs)
            future = StepFuture(name, verb.kind, fingerprint, needs, ref=ref)
        self.futures[name] = future
        return future

    def wait(self, *futures: StepFuture) -> bool:
        """Wait for steps while showing the progress of all; True if every one of them made its artifact."""
        import ray

        waiting = [future for future in self.futures.values() if self._pending(future)]
        wanted = {future.name for future in futures}
        while any(future.name in wanted for future in waiting):
            ray.wait([future.ref for future in waiting], num_returns=1, timeout=_POLL_S)
            self._show()
            for future in waiting:
                if ray.wait([future.ref], timeout=0)[0]:
                    self._settle(future)
            waiting = [future for future in waiting if self._pending(future)]
        return not any(future.name in self.failures for future in futures)

    def wait_all(self) -> None:
        """Wait for every step that was called."""
        self.wait(*self.futures.values())

    def culprits(self) -> dict[str, BaseException]:
        """The failures that no earlier failure explains."""
        needs = {name: self.futures[name].needs for name in self.failures}
        return {n: e for n, e in self.failures.items() if not any(need in self.failures for need in needs[n])}

    def artifacts(self) -> dict[str, Artifact]:
        """The artifacts that are there so far, by step."""
        return {name: f.result() for name, f in self.futures.items() if name in self._done or f.reused}

    def _surroundings(self) -> tuple[Store, Catalog, str, Any, bool]:
        import ray

        if self._board is None:
            self._shared = self.connect()
            self._board = ray.remote(Board).options(num_cpus=0).remote()
        return self.store, self.catalog, self.run_id, self._board, self._shared

    def _submit(self, task: StepTask, inputs: Mapping[str, StepFuture | Source]) -> Any:
        import ray

        # Ray resolves futures that are arguments, not those inside a container: roles and values go side by side.
        values = [item.ref or item.artifact if isinstance(item, StepFuture) else item for item in inputs.values()]
        return ray.remote(_run).options(num_cpus=0, max_retries=0).remote(task, list(inputs), *values)

    def _pending(self, future: StepFuture) -> bool:
        return not future.reused and future.name not in self._done and future.name not in self.failures

    def _settle(self, future: StepFuture) -> None:
        try:
            artifact = future.result()
        except Exception as error:
            self.failures[future.name] = cause_of(error)
            waited = [name for name in future.needs if name in self.failures]
            reason = f"not run, {waited[0]} failed" if waited else str(self.failures[future.name])
            self.terminal.failed(future.name, reason)
        else:
            self._done.add(future.name)
            self.terminal.finished(future.name, artifact.manifest.duration_s, future.fingerprint)

    def _show(self) -> None:
        import ray

        counts, warnings = ray.get(self._board.read.remote())
        self.terminal.show(counts, warnings)


def _run(task: StepTask, roles: list[str], *values: Any) -> Artifact:
    return run_step(task, dict(zip(roles, values, strict=True)))

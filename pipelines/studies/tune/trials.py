"""Trials run by Ray Tune: some of the steps of a workflow, a few at once, each in an actor of its own.

A trial is a function trainable that runs one durable step, which starts a Ray Train job: the way in which Ray documents
Ray Train in Ray Tune. Artifacts make a search resumable, so Ray Tune's own state is temporary.
"""

import asyncio
import tempfile
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from edt_core.errors import DivergedError, Stopped
from edt_core.store.artifact import Artifact, Source
from jobs.runtime.loopback import variables
from jobs.stages.stage import Input
from pipelines.engine.step import StepFuture, StepTask, run_step
from pipelines.engine.workflow import Workflow

LOSS = "holdout_loss"  # the metric that trials report
_TRIAL = "trial"  # the key of a trial's name in its configuration
_MAX_RETRIES = 3  # of a trial whose process was lost; an error of its training is not retried
_MOST_AT_ONCE = 8  # each is a process of some hundred megabytes
_CLOSE_S = 10.0  # how long trials have to end; what is left ends with the session
# A trial takes no CPU, because its training has them. Ray Tune requires some resource: this one is on every head node.
_RESOURCES = {"node:__internal_head__": 0.001}
# Relative paths stay those of the command, and no log files are written beside MLflow.
_ENVIRONMENT = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"}

Ended = Artifact | BaseException


class Endings:
    """A Ray actor that has the artifact or error of each trial, for those that wait for it."""

    def __init__(self) -> None:
        self._ended: dict[str, Ended] = {}
        self._events: dict[str, asyncio.Event] = {}

    async def put(self, name: str, ended: Ended) -> None:
        """Store how a trial ended. Its first ending counts."""
        self._ended.setdefault(name, ended)
        self._event(name).set()

    async def get(self, name: str) -> Artifact:
        """Wait for a trial. Returns its artifact, or raises its error."""
        await self._event(name).wait()
        ended = self._ended[name]
        if isinstance(ended, BaseException):
            raise ended
        return ended

    def _event(self, name: str) -> asyncio.Event:
        return self._events.setdefault(name, asyncio.Event())


class Trials:
    """The trials of a workflow: `add` returns a reference to the artifact, `start` runs all that were added."""

    def __init__(self) -> None:
        self._tasks: dict[str, tuple[StepTask, Mapping[str, Input]]] = {}
        self._endings: Any = None
        self._thread: threading.Thread | None = None
        self._stopper = SimpleNamespace(closing=False)  # read by Ray Tune, which pickles what stops it

    def add(self, task: StepTask, inputs: Mapping[str, Input]) -> Any:
        """Add a step. Returns at once."""
        from jobs.runtime.cluster import start_beside

        if self._endings is None:
            self._endings = start_beside(Endings)
        self._tasks[task.name] = (task, inputs)
        return self._endings.get.remote(task.name)

    def start(self, at_once: int) -> None:
        """Run the trials that were added, at most `at_once` of them at the same time. Returns at once."""
        if self._tasks:
            self._thread = threading.Thread(target=self._fit, args=(at_once,), name="edt-ray-tune", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the trials that run and start no others."""
        self._stopper.closing = True
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def _fit(self, at_once: int) -> None:
        """Run Ray Tune. In a thread other than the main one it leaves Ctrl-C alone."""
        import ray

        endings: dict[str, BaseException] = {}
        problem: BaseException | None = None
        try:
            with variables(_ENVIRONMENT), tempfile.TemporaryDirectory(prefix="edt-tune-") as folder:
                results = self._tuner(at_once, folder).fit()
                endings = {result.config[_TRIAL]: result.error for result in results if result.error and result.config}
        except Exception as error:
            problem = error
        for name in self._tasks:  # those whose process was lost, or that did not begin
            lost = endings.get(name) or problem or Stopped("stopped before its end")
            ray.get(self._endings.put.remote(name, lost))

    def _tuner(self, at_once: int, folder: str) -> Any:
        from ray import tune

        state = self._stopper

        class Closing(tune.Stopper):
            def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
                return False

            def stop_all(self) -> bool:
                return bool(state.closing)

        trainable = tune.with_parameters(run_trial, tasks=self._tasks, endings=self._endings)
        return tune.Tuner(
            tune.with_resources(trainable, _RESOURCES),
            param_space={_TRIAL: tune.grid_search(list(self._tasks))},
            tune_config=tune.TuneConfig(metric=LOSS, mode="min", max_concurrent_trials=at_once),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=_MAX_RETRIES),
                stop=Closing(),
            ),
        )


def run_trial(
    config: Mapping[str, str], tasks: Mapping[str, tuple[StepTask, Mapping[str, Input]]], endings: Any
) -> None:
    """Run one step, and report its held-out loss: NaN if it failed. For Ray Tune only a lost process is an error."""
    import ray
    from ray import tune

    from jobs.runtime.cluster import cause_of

    task, inputs = tasks[config[_TRIAL]]
    ended: Ended
    try:
        if ray.get(task.board.stopping.remote(task.name)):
            raise Stopped("stopped before it began")
        ended = run_step(task, inputs)
    except Exception as error:
        ended = _sendable(cause_of(error), error)
    ray.get(endings.put.remote(task.name, ended))
    tune.report({LOSS: float("nan") if isinstance(ended, BaseException) else loss_of(ended) or float("nan")})


def _sendable(cause: BaseException, raised: BaseException) -> BaseException:
    """The error as another process can read it, with its traceback as a note: tracebacks are not pickled."""
    from ray import cloudpickle

    try:
        cloudpickle.loads(cloudpickle.dumps(cause))
    except Exception:
        cause = RuntimeError(f"{type(cause).__name__}: {cause}")
    cause.add_note("".join(traceback.format_exception(raised)))
    return cause


def loss_of(checkpoint: Artifact) -> float | None:
    """The held-out loss at the end of a training; None if it was not measured."""
    loss: float | None = checkpoint.counts.get("holdout", {}).get("loss")
    return loss


@dataclass
class TrialWorkflow(Workflow):
    """A workflow that gives its steps to Ray Tune while it has `trials`. One that diverged is no failure of the run."""

    trials: Trials | None = field(default=None)

    def culprits(self) -> dict[str, BaseException]:
        return {name: error for name, error in super().culprits().items() if not isinstance(error, DivergedError)}

    def _submit(self, task: StepTask, inputs: Mapping[str, StepFuture | Source]) -> Any:
        if self.trials is None:
            return super()._submit(task, inputs)
        found = {role: item.result() if isinstance(item, StepFuture) else item for role, item in inputs.items()}
        return self.trials.add(task, found)


def room_at_once(workers: int, cpus: float, gpus: float, most: int | None) -> int:
    """How many trainings of so many workers, with these CPUs and GPUs each, fit on the cluster; at least 1."""
    import ray

    total = ray.cluster_resources()
    needs = {"CPU": workers * cpus, "GPU": workers * gpus}
    fitting = [int(total.get(name, 0) // number) for name, number in needs.items() if number]
    return max(1, min([*fitting, most or _MOST_AT_ONCE]))

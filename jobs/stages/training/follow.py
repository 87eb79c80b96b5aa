"""The evaluations along a training, begun while it trains, and the training that they end.

The step `along` measures every kept checkpoint after the training. What is made of it here, on resources that nobody
else needs, it finds in its own folder. With `train.patience` the training waits for these evaluations instead.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, NamedTuple

from edt_core.config import TrainConfig, result_fields
from edt_core.errors import Stopped, UserError
from edt_core.evaluation.config import AlongConfig
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter, Manifest, Source, sha256_json
from edt_core.store.layout import CHECKPOINTS
from edt_core.store.store import Store, store_of
from edt_core.training.checkpoint import checkpoint_name
from edt_core.training.store import CheckpointStore
from jobs.runtime.cluster import room_for
from jobs.stages import along
from jobs.stages.holdout.split import class_counts

ALONG, UNTIL = "along", "until"  # roles of a `Beside`: one that only shows a curve, and one that may end the training
_ENOUGH = ".enough"  # in the attempt: the evaluations have ended this training; removed before the commit
_LOOK_EVERY_S = 5.0


class Made(NamedTuple):
    """An artifact that another step makes, perhaps at this moment."""

    kind: str
    fingerprint: str


@dataclass(frozen=True)
class Beside:
    """The evaluations along a training, as an input of it: their protocol, and their other inputs by role.

    `metric` is the one that `train.patience` watches.
    """

    config: AlongConfig
    inputs: Mapping[str, Source | Made]
    metric: str
    lower_is_better: bool

    @property
    def fingerprint(self) -> str:
        """The identity of what decides when the training ends."""
        watched = {"metric": self.metric, "lower_is_better": self.lower_is_better}
        inputs = {role: item.fingerprint for role, item in self.inputs.items()}
        return sha256_json({"along": result_fields(self.config), "inputs": inputs, **watched})

    def networks(self, store: Store, given: Mapping[str, Any]) -> dict[str, Artifact | Source] | None:
        """The inputs by role, those that are `given` or finished in the store; None while one is not."""
        found: dict[str, Artifact | Source] = {}
        for role, item in self.inputs.items():
            ready = given.get(role) or (item if isinstance(item, Source) else store.find(*item))
            if ready is None:
                return None
            found[role] = ready
        return found


def ran_out(values: Mapping[int, float], patience: int, lower_is_better: bool) -> int | None:
    """The first step at which the best value is `patience` evaluations old; None if there is none.

    values: of the metric, by step. One that is not finite is never better.
    """
    best, waited = float("inf"), 0
    for step in sorted(values):
        value = values[step] if lower_is_better else -values[step]
        best, waited = (value, 0) if isfinite(value) and value < best else (best, waited + 1)
        if waited == patience:
            return step
    return None


@dataclass
class Follower:
    """Measures the kept checkpoints of an unfinished training, in order of step."""

    beside: Beside
    config: TrainConfig
    inputs: Mapping[str, Any]
    out: ArtifactWriter
    progress: Progress
    holdout: Any
    rows: dict[int, Mapping[str, float]] = field(default_factory=dict)
    leave: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        store = store_of(self.out.folder, self.out.kind, self.out.fingerprint)
        assert store is not None, "only the workflow knows the evaluations along a training"
        self._store = store
        self._kept = CheckpointStore(self.out, self.config.num_to_keep, lambda message: None)
        self._target = self._writer()

    def run(self) -> None:
        """Measure checkpoints as they are written, until `leave` is set. An error becomes a warning."""
        try:
            while not self.leave.is_set():
                if not self._follow():
                    self.leave.wait(_LOOK_EVERY_S)
        except Exception as error:
            if not self.leave.is_set():
                self.progress.warn(f"no evaluations beside the training, they are made after it: {error}")

    def finish(self) -> int | None:
        """The step at which the patience ran out, None if it did not; measures the checkpoints that are left.

        Raises Stopped after a stop request, UserError if a checkpoint cannot be measured.
        """
        self.leave.clear()
        while self.config.patience is not None and self.ended_at() is None and (due := self._due()):
            if self.progress.stopping():
                raise Stopped("stopped between two evaluations of the trained model; run again to continue with them")
            self._measure(due[0], self.beside.config.num_workers)
        return self.ended_at()

    def ended_at(self) -> int | None:
        """The step at which the patience has run out by now; None for a training without patience."""
        if self.config.patience is None:
            return None
        values = {step: row[self.beside.metric] for step, row in self.rows.items()}
        return ran_out(values, self.config.patience, self.beside.lower_is_better)

    def _follow(self) -> bool:
        """Measure the next checkpoint, if there is one and the cluster has room; whether it was measured."""
        if self.ended_at() is not None or not (due := self._due()):
            return False
        needed = {"CPU": self.beside.config.num_cpus_per_worker, "GPU": self.beside.config.num_gpus_per_worker}
        workers = room_for(self.beside.config.num_workers, **needed)
        if not workers or not self._measure(due[0], workers):
            return False
        if self.ended_at() is not None:
            self.out.data.write_bytes(_ENOUGH, b"")
        return True

    def _due(self) -> list[int]:
        """The complete checkpoints that are not measured yet, in order of step."""
        every = self.beside.config.every
        assert every is not None
        return [step for step in sorted(self._kept.manifests()) if step % every == 0 and step not in self.rows]

    def _measure(self, step: int, workers: int) -> bool:
        """Measure the checkpoint of a step; False if the networks for it are not made yet, or it was time to leave."""
        networks = self.beside.networks(self._store, self.inputs)
        if networks is None:
            return False
        inputs = {**networks, "checkpoint": self._as_if_ended(step)}
        config = self.beside.config
        along.check_networks(config, inputs)
        for _ in along.sampled(config, inputs, [step], self._target, workers):
            if self.leave.is_set():
                return False
        (row,) = along.rows(config, [step], inputs, self._target)
        self.rows[step] = row
        self.progress.metrics({f"along_{name}": value for name, value in row.items() if name != "step"}, step)
        return True

    def _as_if_ended(self, step: int) -> Artifact:
        """The training's artifact as it would be if the checkpoint of `step` were its last."""
        from edt_core.data.scale import LatentScale

        latents: Artifact = self.inputs["latents"]
        folder = f"{CHECKPOINTS}/{checkpoint_name(step)}"
        files = tuple(entry for entry in self.out.entries_in(folder).values() if entry is not None)
        counts = {
            "model": self.config.model,
            "steps": step,
            "final": folder,
            "checkpoints": [checkpoint_name(step)],
            "autoencoder_digest": latents.counts["autoencoder_digest"],
            "class_counts": class_counts(self.out, latents, self.holdout),
            **LatentScale.of(latents.counts).beyond_factor(),
        }
        fields = result_fields(self.config)
        attempt = self.out.attempt
        return Artifact(
            self.out.folder, Manifest(self.out.kind, self.out.fingerprint, fields, {}, files, counts, attempt)
        )

    def _writer(self) -> ArtifactWriter:
        """Where the step `along` will look for units of samples."""
        inputs = {role: item.fingerprint for role, item in self.beside.inputs.items()}
        identity = along.STAGE.fingerprint(self.beside.config, {**inputs, "checkpoint": self.out.fingerprint})
        return along.begun_early(self._store.writer(along.STAGE.kind, identity))


@contextmanager
def followed(follower: Follower) -> Iterator[None]:
    """Inside, the follower works in a thread."""
    thread = threading.Thread(target=follower.run, name="edt-along", daemon=True)
    thread.start()
    try:
        yield
    finally:
        follower.leave.set()
        thread.join()


def has_enough(out: ArtifactWriter) -> bool:
    """Whether the evaluations have ended this training."""
    return out.data.exists(_ENOUGH)


def remove_enough(out: ArtifactWriter) -> None:
    """Remove the mark from a finished attempt."""
    out.data.remove(_ENOUGH)


def check_patience(config: TrainConfig, inputs: Mapping[str, Any]) -> None:
    """Raise UserError for a training with patience that nothing is measured along."""
    if config.patience is not None and config.max_steps and UNTIL not in inputs:
        raise UserError(
            f"train.patience is {config.patience}, but nothing is evaluated along this training: that needs a pipeline "
            "with along.every (edt run); leave out train.patience to train alone"
        )

"""The checkpoints of a training: written in the background, verified before use, and pruned.

Pruning keeps the newest few, the one of least loss, those of every `keep_every` steps, and an extra checkpoint (written
when a person stopped the training or its node was about to shut down) while it is the newest of all.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from edt_core.files.small_files import UnusableFileError
from edt_core.store.artifact import ArtifactWriter
from edt_core.store.cache import local_directory
from edt_core.store.folder import Folder
from edt_core.store.layout import CHECKPOINT_MANIFEST, CHECKPOINTS, STEP_PREFIX
from edt_core.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointManifest,
    HostMemory,
    check_checkpoint,
    checkpoint_name,
    load_checkpoint,
    read_manifest,
    write_checkpoint,
    write_tensors,
)
from edt_core.training.posthoc.snapshots import Snapshot, SnapshotStore, help_write
from edt_core.training.shard.files import JointFiles, save_alone

if TYPE_CHECKING:
    from edt_core.config import TrainConfig


@dataclass
class CheckpointStore:
    """Checkpoints in the folder `checkpoints` of an unfinished artifact. For one process at a time.

    With `joint` each rank saves its tensors at the same steps, into files that rank 0 creates and publishes.

    `warn` is called for damaged checkpoints; `changed` is called in the writing thread after one was written.
    """

    out: ArtifactWriter
    num_to_keep: int
    warn: Callable[[str], None]
    changed: Callable[["CheckpointStore"], None] = lambda store: None
    stable_step: int | None = None  # the newest checkpoint up to this step is kept: longer trainings continue from it
    keep_every: int | None = None  # checkpoints of multiples of so many steps are kept
    joint: JointFiles | None = None
    _memory: HostMemory = field(default_factory=HostMemory)
    _writing: Future[None] | None = None
    _taking: Future[None] | None = None  # the last snapshot's write
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "edt-checkpoint"))

    @property
    def folder(self) -> Folder:
        return self.out.data.child(CHECKPOINTS)

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint to host memory and write it in a thread. Raises the error of the previous write."""
        if self._writing is not None:
            self._writing.result()
        self._writing = self._thread.submit(self._write, self._memory.copy(checkpoint), self._taking)

    @property
    def snapshots(self) -> SnapshotStore:
        """The snapshots beside the checkpoints. Those up to a checkpoint are written before it."""
        return SnapshotStore(self.out)

    def save_snapshot(self, step: int, config: "TrainConfig", averages: Sequence[Mapping[str, Tensor]]) -> None:
        """Copy averages to host memory and write their snapshot in the thread. Raises the error of the previous one."""
        if self._taking is not None:
            self._taking.result()
        self._taking = self._thread.submit(self._write_snapshot, Snapshot.of(step, config, averages))

    def report_missing(self, steps: Collection[int], widths: Sequence[float], last: int) -> None:
        """Warn of the snapshots that were due after `steps` up to the step `last` and are not here."""
        due = {step for step in steps if step <= last}
        if missing := sorted(due - self.snapshots.whole(widths)) if due else []:
            self.warn(
                f"the snapshots of the averages after {', '.join(map(str, missing))} steps are missing or damaged, and "
                "this training cannot take them again; `edt ema` works without them, with a larger error"
            )

    def flush(self) -> None:
        """Wait until the last checkpoint and snapshot are written. Raises the error of that write."""
        for write in self._writes():
            write.result()

    def check(self) -> None:
        """Raise the error of the last checkpoint's or snapshot's write, if it has failed by now. Does not wait."""
        for write in self._writes():
            if write.done():
                write.result()

    def _writes(self) -> list[Future[None]]:
        return [write for write in (self._taking, self._writing) if write is not None]

    def steps(self) -> list[int]:
        """Steps of all checkpoints, also incomplete ones, in order."""
        begun = [name.split("/")[1] for name in self.out.begun(CHECKPOINTS)]
        numbers = {name.removeprefix(STEP_PREFIX) for name in (*self.folder.names(), *begun)}
        return sorted(int(number) for number in numbers if number.isdecimal())

    def manifests(self, reasons: list[str] | None = None) -> dict[int, CheckpointManifest]:
        """The manifests by step. One that cannot be read is left out, and the reason is added to `reasons`."""
        manifests = {}
        for step in self.steps():
            folder = self.folder.child(checkpoint_name(step))
            try:
                manifests[step] = read_manifest(folder.read_bytes(CHECKPOINT_MANIFEST), folder.uri)
            except FileNotFoundError:  # its writer ended while it was writing or removing the checkpoint
                continue
            except (CheckpointError, UnusableFileError) as error:
                (reasons if reasons is not None else []).append(str(error))
        return manifests

    def newest(self) -> int | None:
        """The step of the newest valid checkpoint. Newer, damaged ones are removed with a warning.

        Snapshots after it are removed as well: a training that resumes from it takes them again.
        """
        self.flush()
        return self._newest([])

    def _newest(self, reasons: list[str]) -> int | None:
        """As `newest`, with warnings also for `reasons`, why other checkpoints cannot be used."""
        newest = None
        for step in reversed(self.steps()):
            try:
                check_checkpoint(self._local(step))
                newest = step
                break
            except CheckpointError as error:
                reasons.append(str(error))
                self.remove(step)
        instead = "the start" if newest is None else f"{self.folder.uri}/{checkpoint_name(newest)}"
        for reason in reasons:
            self.warn(f"a checkpoint cannot be used: {reason}; resuming from {instead} instead")
        self.snapshots.keep(newest or 0)
        return newest

    def load(self, step: int) -> Checkpoint:
        """Verify and read a checkpoint. Raises CheckpointError."""
        return load_checkpoint(self._local(step))

    def remove(self, step: int) -> None:
        """Remove a checkpoint, its manifest first, so that an interrupted removal does not leave a valid one.

        If the checkpoint was moved elsewhere and linked, only the link is removed.
        """
        name = f"{CHECKPOINTS}/{checkpoint_name(step)}"
        local = self.folder.child(checkpoint_name(step)).local
        if local is None or not local.is_symlink():
            self.out.data.remove(f"{name}/{CHECKPOINT_MANIFEST}")
        self.out.discard(name)

    def prune(self, *, at_end: bool = False) -> list[int]:
        """Remove the checkpoints that are not in `to_keep`; return the remaining steps."""
        manifests = self.manifests()
        remaining = self._to_keep(manifests, at_end=at_end)
        for step in self.steps():
            if step not in remaining:
                self.remove(step)
        return sorted(remaining)

    def adopt(self) -> None:
        """Recover the checkpoints to keep from earlier attempts at the same artifact, after verifying them; prune."""
        reasons: list[str] = []
        earlier: dict[int, tuple[ArtifactWriter, CheckpointManifest]] = {}
        for attempt in self.out.previous:  # the newest first
            out = replace(self.out, attempt=attempt, previous=())
            for step, manifest in CheckpointStore(out, self.num_to_keep, self.warn).manifests(reasons).items():
                earlier.setdefault(step, (out, manifest))
        own = self.manifests()
        while missing := self._missing({step: manifest for step, (_, manifest) in earlier.items()}, own):
            writer, manifest = earlier.pop(max(missing))
            if reason := self._recover(writer, manifest):
                reasons.append(reason)
            else:
                own[manifest.step] = manifest
        self.snapshots.adopt(self._newest(reasons) or 0)
        self.prune()

    def _missing(self, earlier: dict[int, CheckpointManifest], own: dict[int, CheckpointManifest]) -> set[int]:
        """Steps of earlier attempts' checkpoints to keep that are not among this attempt's own."""
        return self._to_keep({**earlier, **own}) - own.keys()

    def _to_keep(self, manifests: dict[int, CheckpointManifest], *, at_end: bool = False) -> set[int]:
        steps = to_keep(manifests, self.num_to_keep, at_end=at_end)
        stable = [step for step in manifests if self.stable_step is not None and step <= self.stable_step]
        steps |= {max(stable)} if stable else set()
        return steps | set(filter(self.is_kept, manifests))

    def is_kept(self, step: int) -> bool:
        """Whether the checkpoint of a step is never removed."""
        return self.keep_every is not None and step % self.keep_every == 0

    def end_at(self, last: int) -> None:
        """Keep the checkpoints of every `keep_every` steps up to step `last`, and nothing after it.

        Which of the others exist depends on when the training ended.
        """
        self.flush()
        for step in self.steps():
            if step > last or not self.is_kept(step):
                self.remove(step)
        self.snapshots.keep(last)

    def _recover(self, earlier: ArtifactWriter, manifest: CheckpointManifest) -> str | None:
        """Recover an earlier attempt's checkpoint; return the reason if it is damaged."""
        folder = f"{CHECKPOINTS}/{checkpoint_name(manifest.step)}"
        source = replace(self.out, previous=(earlier.attempt,))
        for name in (*manifest.files, CHECKPOINT_MANIFEST):
            entry = source.recover(f"{folder}/{name}")
            if entry is None or entry.sha256 != manifest.files.get(name, entry.sha256):
                self.remove(manifest.step)
                return f"{earlier.data.uri}/{folder}/{name} is missing or does not match its digest"
        return None

    def _write(self, checkpoint: Checkpoint, snapshot: Future[None] | None) -> None:
        if snapshot is not None:
            snapshot.result()  # done, as it was given to the thread before; a failed one has no checkpoint after it
        if self.joint is not None and self.joint.ranks.rank != 0:
            write_tensors(checkpoint, self.joint.save)
            return
        folder = f"{CHECKPOINTS}/{checkpoint_name(checkpoint.step)}"
        save = save_alone if self.joint is None else self.joint.save
        write_checkpoint(checkpoint, lambda name, write_to: self.out.write(f"{folder}/{name}", write_to), save)
        self.prune()
        self.changed(self)

    def _write_snapshot(self, snapshot: Snapshot) -> None:
        if self.joint is None:
            self.snapshots.write(snapshot)
        elif self.joint.ranks.rank == 0:
            self.snapshots.write(snapshot, self.joint.save)
        else:
            help_write(snapshot, self.joint.save)

    def _local(self, step: int) -> Path:
        return local_directory(self.folder.child(checkpoint_name(step)))


def to_keep(manifests: dict[int, CheckpointManifest], num_to_keep: int, *, at_end: bool = False) -> set[int]:
    """The steps to keep: the newest regular ones, the regular one of least loss and, before the end, the newest."""
    regular = sorted(step for step, manifest in manifests.items() if manifest.regular)
    steps = set(regular[-num_to_keep:])
    if (best := best_step(manifests)) is not None:
        steps.add(best)
    if manifests and not at_end:
        steps.add(max(manifests))
    return steps


def best_step(manifests: dict[int, CheckpointManifest]) -> int | None:
    """The step of the regular checkpoint of least score, the earliest one if several are equal.

    The score is the held-out loss, or in a training without held-out images its own loss.
    """
    scored = [(m.score, step) for step, m in manifests.items() if m.regular and m.score is not None]
    return min(scored)[1] if scored else None

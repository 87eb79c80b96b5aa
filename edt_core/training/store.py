"""The checkpoints of a training: written behind its back, checked before they are used, and pruned.

Kept are the newest few, the one of least loss, and, while it is the newest of all, one that was written out of turn
(when somebody stopped the training, or its node was about to go).
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

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
)


@dataclass
class CheckpointStore:
    """Checkpoints in the folder `checkpoints` of an artifact that is being made. For one process at a time.

    `warn` hears of damaged checkpoints; `changed` is called, in the writing thread, when one was written.
    """

    out: ArtifactWriter
    num_to_keep: int
    warn: Callable[[str], None]
    changed: Callable[["CheckpointStore"], None] = lambda store: None
    _memory: HostMemory = field(default_factory=HostMemory)
    _writing: Future[None] | None = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "edt-checkpoint"))

    @property
    def folder(self) -> Folder:
        return self.out.data.child(CHECKPOINTS)

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint to the host's memory and have a thread write it. Raises what the last one ended with."""
        self.flush()
        self._writing = self._thread.submit(self._write, self._memory.copy(checkpoint))

    def flush(self) -> None:
        """Wait until the last checkpoint is written. Raises what its writing ended with."""
        if self._writing is not None:
            self._writing.result()

    def check(self) -> None:
        """Raise what the last checkpoint's writing ended with, if it ended."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    def steps(self) -> list[int]:
        """Steps of the checkpoints of which anything is there, in order."""
        begun = [name.split("/")[1] for name in self.out.begun(CHECKPOINTS)]
        found = {name.removeprefix(STEP_PREFIX) for name in (*self.folder.names(), *begun)}
        return sorted(int(number) for number in found if number.isdecimal())

    def manifests(self, reasons: list[str] | None = None) -> dict[int, CheckpointManifest]:
        """What the manifests say, by step; one that cannot be read is left out, and why is added to `reasons`."""
        found = {}
        for step in self.steps():
            place = self.folder.child(checkpoint_name(step))
            try:
                found[step] = read_manifest(place.read_bytes(CHECKPOINT_MANIFEST), place.uri)
            except FileNotFoundError:  # it was being written, or removed, when its writer ended
                continue
            except (CheckpointError, UnusableFileError) as error:
                (reasons if reasons is not None else []).append(str(error))
        return found

    def newest(self) -> int | None:
        """The step of the newest whole checkpoint. Newer ones are damaged: they are removed, with a warning."""
        self.flush()
        return self._newest([])

    def _newest(self, reasons: list[str]) -> int | None:
        """The same, with reasons why some are not here at all."""
        found = None
        for step in reversed(self.steps()):
            try:
                check_checkpoint(self._local(step))
                found = step
                break
            except CheckpointError as error:
                reasons.append(str(error))
                self.remove(step)
        instead = "the start" if found is None else f"{self.folder.uri}/{checkpoint_name(found)}"
        for reason in reasons:
            self.warn(f"a checkpoint cannot be used: {reason}; resuming from {instead} instead")
        return found

    def load(self, step: int) -> Checkpoint:
        """A checkpoint after verifying it. Raises CheckpointError."""
        return load_checkpoint(self._local(step))

    def remove(self, step: int) -> None:
        """Remove a checkpoint, its manifest first: what is interrupted half-way is not taken for one.

        Of a checkpoint that somebody moved elsewhere and linked, the link goes.
        """
        name = f"{CHECKPOINTS}/{checkpoint_name(step)}"
        local = self.folder.child(checkpoint_name(step)).local
        if local is None or not local.is_symlink():
            self.out.data.remove(f"{name}/{CHECKPOINT_MANIFEST}")
        self.out.discard(name)

    def prune(self, *, at_end: bool = False) -> list[int]:
        """Remove what is not to be kept; returns the steps that are. At the end only regular ones are."""
        manifests = self.manifests()
        kept = to_keep(manifests, self.num_to_keep, at_end=at_end)
        for step in self.steps():
            if step not in kept:
                self.remove(step)
        return sorted(kept)

    def adopt(self) -> None:
        """Take over what is to be kept of earlier attempts at the same artifact, after verifying it, and prune."""
        reasons: list[str] = []
        found: dict[int, tuple[ArtifactWriter, CheckpointManifest]] = {}
        for attempt in self.out.previous:  # the newest first
            out = replace(self.out, attempt=attempt, previous=())
            for step, manifest in CheckpointStore(out, self.num_to_keep, self.warn).manifests(reasons).items():
                found.setdefault(step, (out, manifest))
        here = self.manifests()
        while wanted := self._wanted({step: manifest for step, (_, manifest) in found.items()}, here):
            earlier, manifest = found.pop(max(wanted))
            if reason := self._take(earlier, manifest):
                reasons.append(reason)
            else:
                here[manifest.step] = manifest
        self._newest(reasons)
        self.prune()

    def _wanted(self, there: dict[int, CheckpointManifest], here: dict[int, CheckpointManifest]) -> set[int]:
        """Steps of those there that are to be kept beside what is here."""
        return to_keep({**there, **here}, self.num_to_keep) - here.keys()

    def _take(self, earlier: ArtifactWriter, manifest: CheckpointManifest) -> str | None:
        """Take over an earlier attempt's checkpoint; the reason where it is damaged."""
        place = f"{CHECKPOINTS}/{checkpoint_name(manifest.step)}"
        source = replace(self.out, previous=(earlier.attempt,))
        for name in (*manifest.files, CHECKPOINT_MANIFEST):
            entry = source.recover(f"{place}/{name}")
            if entry is None or entry.sha256 != manifest.files.get(name, entry.sha256):
                self.remove(manifest.step)
                return f"{earlier.data.uri}/{place}/{name} is missing or differs from its digest"
        return None

    def _write(self, checkpoint: Checkpoint) -> None:
        place = f"{CHECKPOINTS}/{checkpoint_name(checkpoint.step)}"
        write_checkpoint(checkpoint, lambda name, write_to: self.out.write(f"{place}/{name}", write_to))
        self.prune()
        self.changed(self)

    def _local(self, step: int) -> Path:
        return local_directory(self.folder.child(checkpoint_name(step)))


def to_keep(manifests: dict[int, CheckpointManifest], num_to_keep: int, *, at_end: bool = False) -> set[int]:
    """The steps to keep: the newest regular ones, the regular one of least loss, and the newest of all."""
    regular = sorted(step for step, manifest in manifests.items() if manifest.regular)
    kept = set(regular[-num_to_keep:])
    if (best := best_step(manifests)) is not None:
        kept.add(best)
    if manifests and not at_end:
        kept.add(max(manifests))
    return kept


def best_step(manifests: dict[int, CheckpointManifest]) -> int | None:
    """The regular checkpoint of least loss, the earlier one of two that are equal."""
    scored = [(m.score, step) for step, m in manifests.items() if m.regular and m.score is not None]
    return min(scored)[1] if scored else None

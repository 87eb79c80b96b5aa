"""Snapshots of the power-function averages of a training, from which an average of any width can be made afterwards.

A snapshot is a folder `snapshots/step-NNNNNNNN` of the artifact, with a safetensors file for each width.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.layout import CHECKPOINTS, SNAPSHOTS, STEP_PREFIX, WIDTH_EMA_WEIGHTS
from edt_core.training.posthoc.profile import Average
from edt_core.training.shard.files import Save, save_alone

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PREFIX, _SUFFIX = map(re.escape, WIDTH_EMA_WEIGHTS.split("{!r}"))
_FILE = re.compile(rf"{SNAPSHOTS}/{STEP_PREFIX}(\d+)/{_PREFIX}([\d.e-]+){_SUFFIX}")


@dataclass(frozen=True)
class Snapshot:
    """The averages after `step` steps on the host, rounded, by width."""

    step: int
    averages: Mapping[float, Mapping[str, Tensor]]

    @classmethod
    def of(cls, step: int, config: TrainConfig, averages: Sequence[Mapping[str, Tensor]]) -> Snapshot:
        """A copy of averages, one for each width, which later steps do not change."""
        dtype = _DTYPES[config.ema_snapshot_dtype]
        copies = [{name: value.to(dtype, copy=True).cpu() for name, value in each.items()} for each in averages]
        return cls(step, dict(zip(config.ema_widths, copies, strict=True)))


def snapshot_steps(config: TrainConfig, total_steps: int) -> set[int]:
    """The steps after which a snapshot is taken: multiples of T / n, rounded up, the last one T."""
    if not config.ema_widths:
        return set()
    number = config.ema_snapshots
    return {-(-place * total_steps // number) for place in range(1, number + 1)} - {0}


@dataclass(frozen=True)
class SnapshotStore:
    """The snapshots of an unfinished artifact. For one process at a time."""

    out: ArtifactWriter

    def write(self, snapshot: Snapshot, save: Save = save_alone) -> None:
        """Write the files of a snapshot, one for each width. With `JointFiles.save` other ranks call `help_write`."""
        for width in snapshot.averages:
            name = f"{_folder(snapshot.step)}/{WIDTH_EMA_WEIGHTS.format(width)}"
            self.out.write(name, _writer(snapshot, width, save))

    def whole(self, widths: Sequence[float]) -> set[int]:
        """Steps of the snapshots that have these widths, each file of the size that was written."""
        damaged, written = self._damaged(), self._begun()
        steps = {average.step for average in written} - damaged
        return {step for step in steps if all(Average(step, width) in written for width in widths)}

    def keep(self, newest: int) -> None:
        """Remove the snapshots after step `newest`, which will be taken again, and damaged ones."""
        for step in {average.step for average in self._begun() if average.step > newest} | self._damaged():
            self.out.discard(_folder(step))

    def adopt(self, newest: int) -> None:
        """Recover the snapshots up to step `newest` from earlier attempts at the same artifact, if undamaged."""
        for attempt in self.out.previous:
            earlier = SnapshotStore(replace(self.out, attempt=attempt, previous=()))
            for average, name in earlier._begun().items():
                if average.step <= newest:
                    self.out.recover(name)

    def _begun(self) -> dict[Average, str]:
        """The averages whose files are written, or about to be published, and their names."""
        return dict(_averages(self.out.begun(SNAPSHOTS)))

    def _damaged(self) -> set[int]:
        """Steps of the snapshots with a file that has not the size that was written, or whose entry is damaged."""
        if not self.out.begun(SNAPSHOTS):
            return set()
        sizes = self.out.data.child(SNAPSHOTS).walk()
        entries = {
            name: None if entry is None else entry.bytes for name, entry in self.out.entries_in(SNAPSHOTS).items()
        }
        return {
            average.step
            for average, name in _averages(entries)
            if entries[name] is None or sizes.get(name.removeprefix(f"{SNAPSHOTS}/")) != entries[name]
        }


def _folder(step: int) -> str:
    return f"{SNAPSHOTS}/{STEP_PREFIX}{step:08d}"


def _averages(names: Iterable[str]) -> Iterator[tuple[Average, str]]:
    """The averages among files of an artifact, with their names."""
    for name in names:
        if (match := _FILE.fullmatch(name)) is not None:
            yield Average(int(match[1]), float(match[2])), name


def help_write(snapshot: Snapshot, save: Save) -> None:
    """Write this rank's tensors into the files of a snapshot that rank 0 makes."""
    for width in snapshot.averages:
        _writer(snapshot, width, save)(None)


def _writer(snapshot: Snapshot, width: float, save: Save) -> Any:
    def write_to(path: Path | None) -> None:
        text = json.dumps({"step": snapshot.step, "width": width})  # one entry: their order is another one each time
        save(snapshot.averages[width], path, {"average": text})

    return write_to


def average_files(artifact: Artifact) -> dict[Average, str]:
    """The averages of a finished training, and their names in the artifact, in order of step and width.

    Those after the last step are in its last checkpoint as well, in float32, which is taken instead of the snapshot.
    """
    files = dict(_averages(entry.path for entry in artifact.entries(f"{SNAPSHOTS}/*")))
    listed = {entry.path for entry in artifact.entries(f"{CHECKPOINTS}/*")}
    for average in files:
        name = f"{CHECKPOINTS}/{STEP_PREFIX}{average.step:08d}/{WIDTH_EMA_WEIGHTS.format(average.width)}"
        files[average] = name if name in listed else files[average]
    return files


def counts_of(config: TrainConfig, store: SnapshotStore) -> dict[str, Any]:
    """What the counts of a training say of its snapshots; empty for a training without."""
    if not config.ema_widths:
        return {}
    return {"ema_snapshots": {"widths": list(config.ema_widths), "steps": sorted(store.whole(config.ema_widths))}}


def reconstructed(parts: Iterable[tuple[float, Path]]) -> dict[str, Tensor]:
    """The sum of coefficient times average over files of averages, float32 on the host; one file is read at a time."""
    from edt_core.files.tensor_files import opened_tensors

    total: dict[str, Tensor] = {}
    for coefficient, path in parts:
        with opened_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118  it is not a dict
                value = file.get_tensor(name).float()
                if name in total:
                    total[name].add_(value, alpha=coefficient)
                else:
                    total[name] = value.mul_(coefficient)
    return total

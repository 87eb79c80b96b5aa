"""What the training loop sees of the world: rank, device, a gather, and where checkpoints go. No Ray in sight."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from edt_core.training.checkpoint import Checkpoint, checkpoint_name, save_checkpoint


class TrainContext(Protocol):
    """One worker's view of a training."""

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over all ranks."""

    def gather(self, values: Tensor) -> Tensor:
        """float32 [k, n] of each rank, joined in order of rank: [k, world_size * n], on the CPU."""

    def report(self, metrics: Mapping[str, float], checkpoint: Checkpoint | None) -> None:
        """Called by every rank at the same steps; rank 0 brings a checkpoint, the others None."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Called by rank 0 between reports."""


@dataclass
class LocalContext:
    """A training in this process alone; checkpoints go to `folder/step-NNNNNNNN`."""

    folder: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world_size: int = 1
    logged: list[dict[str, float]] = field(default_factory=list)

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def gather(self, values: Tensor) -> Tensor:
        return values.cpu()

    def report(self, metrics: Mapping[str, float], checkpoint: Checkpoint | None) -> None:
        if checkpoint is not None:
            save_checkpoint(self.folder / checkpoint_name(checkpoint.step), checkpoint)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged.append({"step": float(step), **metrics})

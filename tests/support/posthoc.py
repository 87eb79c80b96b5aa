"""A training with snapshots without the training: a model whose weights went from a start to an end."""

from pathlib import Path

import torch

from edt_core.config import TrainConfig
from edt_core.models import DiffusionTransformer
from edt_core.store.artifact import Artifact, ArtifactWriter, fingerprint
from edt_core.store.folder import Folder
from edt_core.training.ema import EMA
from edt_core.training.posthoc.snapshots import Snapshot, SnapshotStore
from jobs.models.derived import derived_counts, write_model
from jobs.models.open import Opened

WIDTHS = (0.05, 0.1)


def with_snapshots(
    opened: Opened, model: DiffusionTransformer, store: Folder, steps: int = 40, other: float = 0.08
) -> tuple[Artifact, dict[str, torch.Tensor]]:
    """The artifact in a store of a training that ended at a model, with 10 snapshots of WIDTHS.

    Also the average of the width `other`, tracked on the way: its parameters grew to those of the model in equal steps.
    """
    end = {name: value.clone() for name, value in model.state_dict().items()}
    ema = EMA(model, (0.9,), widths=(*WIDTHS, other))
    config = {"num_timesteps": opened.checkpoint.manifest.config["num_timesteps"], "ema_widths": list(WIDTHS)}
    identity = fingerprint("checkpoint", 1, config, {})
    out = ArtifactWriter(store.child(f"checkpoint/{identity}"), "checkpoint", identity, "attempt")
    snapshots = SnapshotStore(out)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(end[name] * step / steps)
        ema.update(step=step)
        if step % (steps // 10) == 0:
            snapshots.write(Snapshot.of(step, TrainConfig(ema_widths=WIDTHS), ema.of_widths[:2]))
    final = opened.checkpoint.counts["final"]
    path = opened.checkpoint.path(f"{final}/ema.safetensors")

    def copy(target: Path) -> None:
        target.write_bytes(path.read_bytes())

    write_model(out, final, model.config.to_dict(), copy)
    counts = {name: value for name, value in derived_counts(opened).items() if name != "origin"}
    artifact = out.commit(config, {}, {**counts, "steps": steps})
    return artifact, ema.of_widths[2]

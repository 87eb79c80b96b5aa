"""The final error of a training: one that a restart of its workers cannot fix, kept in the attempt.

Ray Train restarts the workers after any error. They find the record and end, and the job raises the error once.
"""

import json
from typing import TYPE_CHECKING, Any

from edt_core.config import TrainConfig
from edt_core.errors import DivergedError, Stopped, UserError
from edt_core.store.artifact import ArtifactWriter

if TYPE_CHECKING:
    import torch

    from edt_core.models import ModelConfig

_VERDICT = ".verdict.json"  # removed before the commit
_ERRORS: dict[str, type[Exception]] = {"UserError": UserError, "Stopped": Stopped, "NotFinite": DivergedError}
_USABLE = 0.9  # share of a GPU's memory that tensors can fill: libraries and fragments take the rest


def has_verdict(out: ArtifactWriter) -> bool:
    """Whether a worker recorded a final error."""
    return out.data.exists(_VERDICT)


def write_verdict(out: ArtifactWriter, error: Exception) -> None:
    """Record a final error."""
    kind = next((name for name, cls in _ERRORS.items() if isinstance(error, cls)), "NotFinite")
    out.data.write_bytes(_VERDICT, json.dumps({"kind": kind, "message": str(error)}).encode())


def remove_verdict(out: ArtifactWriter) -> None:
    """Remove the record of an earlier job."""
    out.data.remove(_VERDICT)


def raise_verdict(out: ArtifactWriter) -> None:
    """Raise the error that a worker recorded, if there is one."""
    try:
        verdict: dict[str, Any] = json.loads(out.data.read_bytes(_VERDICT))
    except FileNotFoundError:
        return
    remove_verdict(out)
    raise _ERRORS[verdict["kind"]](verdict["message"])


def memory_of(device: "torch.device") -> int | None:
    """Bytes of a GPU that this process has or could have; None for another device."""
    import torch

    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def device_full(config: TrainConfig, model_config: "ModelConfig", workers: int, memory: int | None) -> UserError:
    """The error of a training whose GPU has too little memory, with the micro-batch that would fit.

    `memory`: bytes that are available to a worker, None if they are not known.
    """
    from edt_core.training.estimate import largest_micro_batch

    samples = min(config.micro_batch(), -(-config.global_batch_size // workers))
    fitting = samples // 2
    if memory is not None:
        estimated = largest_micro_batch(config, model_config, int(_USABLE * memory))
        fitting = estimated if estimated < samples else fitting  # else the estimate is too low for this model
    problem = f"a GPU ran out of memory with {samples} samples in a forward pass"
    if memory is not None:
        problem += f" and {memory / (1 << 30):.1f} GiB for the worker"
    further = {"none": "optimizer", "optimizer": None if config.refusal_of_full() else "full"}.get(config.shard)
    divide = f" or --set train.shard={further}" if workers > 1 and further else ""
    if fitting < 1:
        return UserError(
            f"{problem}, and no smaller micro-batch fits. Rerun with --set train.activation_checkpointing=true{divide}"
            "; or train another model (train.model, train.precision=bf16), or use a GPU with more memory"
        )
    return UserError(
        f"{problem}. Rerun with --set train.micro_batch_size={fitting} (edt train: --micro-batch-size {fitting}): the "
        "training resumes, and gradients are accumulated. --set train.activation_checkpointing=true"
        f"{divide} also saves memory"
    )

"""Estimate of a training's cost before it starts: the model's size, memory, steps. No model is run."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from edt_core.files.host_copies import RING_BYTES
from edt_core.models import (
    DiffusionTransformer,
    ModelConfig,
    draw_masks,
    macs_of,
    shadow,
)
from edt_core.models.attention import RelativePositionBias
from edt_core.training.align.cost import align_activations
from edt_core.training.align.settings import align_settings
from edt_core.training.shard.owners import largest_share
from edt_core.training.shard.rows import gathered_bytes
from edt_core.training.start.kept import kept
from edt_core.training.start.trainable import count_merged, step_flops

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

_COPIES = {"muon": 2}  # of the gradients, during an update: Muon also stacks the matrices of a shape
_GIGA = 1e9
_PROCESS = 4 << 30  # bytes of host memory of a GPU's worker beside its tensors: libraries, kernels, batches ahead


@dataclass(frozen=True)
class Estimate:
    """The cost of a training. Bytes are those of one worker; `activations` are saved for one micro-batch's backward.

    `temporary`: what the highest moment needs beyond these, in the backward pass or in the optimizer.
    """

    model: str
    parameters: int
    macs: int
    flops_per_image: int
    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    temporary: int
    checkpoint: int
    micro_batch: int
    images: int
    global_batch_size: int
    steps: int
    snapshot: int = 0  # bytes of one snapshot of the power-function averages
    snapshots: int = 0

    @property
    def state(self) -> int:
        """Bytes of a worker that do not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.ema

    @property
    def memory(self) -> int:
        """Bytes of all tensors of a worker, without the overhead of libraries and kernels."""
        return self.state + self.activations + self.temporary

    @property
    def steps_per_epoch(self) -> float:
        return self.images / self.global_batch_size

    def __str__(self) -> str:
        rows = {
            "parameters": f"{self.parameters:,}",
            "MACs per image": f"{self.macs / _GIGA:,.3g} G (the paper's GFLOPs)",
            "training FLOPs per image": f"{self.flops_per_image / _GIGA:,.3g} G",
            "memory per worker": f"about {size_text(self.memory)}: weights {size_text(self.weights)}, gradients "
            f"{size_text(self.gradients)}, optimizer {size_text(self.optimizer)}, EMA {size_text(self.ema)}, "
            f"activations {size_text(self.activations)} (micro-batch {self.micro_batch}), "
            f"temporary {size_text(self.temporary)}",
            "checkpoint": size_text(self.checkpoint),
            "images": f"{self.images:,}",
            "steps per epoch": f"{self.steps_per_epoch:,.1f}",
            "steps": f"{self.steps:,} of {self.global_batch_size} images, "
            f"{self.steps * self.global_batch_size / self.images:,.1f} epochs",
        }
        if self.snapshots:
            sizes = f"{size_text(self.snapshot)} each, {size_text(self.snapshots * self.snapshot)}"
            rows["snapshots"] = f"{self.snapshots} of the averages by width, {sizes}"
        return "\n".join([self.model, *(f"  {name:<25} {value}" for name, value in rows.items())])


def size_text(number: int) -> str:
    """A number of bytes as text, in GiB or MiB."""
    return f"{number / (1 << 30):,.2f} GiB" if number >= 1 << 30 else f"{number / (1 << 20):,.0f} MiB"


def estimate(config: TrainConfig, model_config: ModelConfig, images: int) -> Estimate:
    """The cost of training a model on a data set of `images` images."""
    sizes, settings = kept(config, model_config, images), align_settings(config, model_config)
    of_model, trained, ema = sizes.of_model, sizes.trained, sizes.ema
    # The averaged model of this target has its own copy of the merged tensors, and two while it takes the next average.
    merged = 4 * count_merged(config, model_config) if config.align == "self" else 0
    part = largest_share(config, model_config)
    is_full = config.shard == "full" and part < 1.0
    of_all = part if is_full else 1.0
    whole = of_model if config.align == "self" else 0  # the first average, which each worker calls as a model
    # Averages are put together for previews and the held-out loss, when there are no activations.
    together = of_model if part < 1.0 and not whole else 0
    saved_by_model = _activations(model_config, config)
    teacher = 0 if config.distill is None else sizes.weights  # which each worker has as a whole
    activations = saved_by_model.activations + align_activations(settings, config.micro_batch())
    return Estimate(
        model=f"{model_config.name}, {model_config.image_size} px, {model_config.num_classes} classes",
        parameters=sizes.weights // 4,
        macs=macs_of(model_config),
        flops_per_image=step_flops(config, model_config),
        weights=round(of_all * (sizes.weights + trained - of_model)) + merged + teacher,
        gradients=round(of_all * trained),
        optimizer=round(part * sizes.optimizer),
        ema=whole + round(part * (ema - whole)),
        activations=activations,
        # The optimizer works on lists of tensors, with a copy of each gradient, after the activations are freed.
        temporary=max(
            saved_by_model.scores + (gathered_bytes(model_config) if is_full else 0),
            merged,
            round(part * _COPIES.get(config.optimizer, 1) * trained) - activations,
            together - activations,
        ),
        checkpoint=sizes.checkpoint,
        micro_batch=config.micro_batch(),
        images=images,
        global_batch_size=config.global_batch_size,
        steps=sizes.steps,
        snapshot=sizes.snapshot,
        snapshots=sizes.snapshots,
    )


def host_memory(needs: Estimate, workers: int) -> int:
    """Bytes of host memory that the GPU workers of a training need on one machine, worker 0 among them.

    Worker 0 keeps a copy of its newest checkpoint, made through a ring of page-locked memory, and writes its files from
    that copy. Latents, and the checkpoint that a training resumes from, are memory-mapped: the system can drop their
    pages, and all workers share them, so they are not counted.
    """
    return workers * _PROCESS + needs.checkpoint + needs.snapshot + RING_BYTES


def largest_micro_batch(config: TrainConfig, model_config: ModelConfig, memory: int) -> int:
    """The most samples in a forward pass for which the estimate is at most `memory` bytes; 0 if not even one.

    At most the global batch. The estimate is not linear: the optimizer's copies count if they exceed the activations.
    """

    def needed(samples: int) -> int:
        return estimate(config.model_copy(update={"micro_batch_size": samples}), model_config, images=1).memory

    return bisect_right(range(1, config.global_batch_size + 1), memory, key=needed)


def _activations(model_config: ModelConfig, config: TrainConfig) -> Saved:
    """What is saved for the backward pass of a micro-batch."""
    precision: Literal["fp32", "bf16"] = "bf16" if config.precision == "bf16" else "fp32"
    rounded = config.residual_dtype == "bf16"
    trace = _Trace(precision, config.activation_checkpointing, config.passes, fused=config.use_gpu, rounded=rounded)
    first, further = _sample_bytes(model_config, trace)
    more = config.micro_batch() - 1
    return Saved(first.activations + more * further.activations, first.scores + more * further.scores)


@dataclass(frozen=True)
class Saved:
    """Bytes saved for the backward pass, and those of the largest gradient of attention scores during it."""

    activations: int
    scores: int


@dataclass(frozen=True)
class _Trace:
    """How a model is traced. `fused`: by the attention kernels of a GPU, which do not save the scores.

    `rounded`: with the tokens between blocks in bfloat16.
    """

    precision: Literal["fp32", "bf16"]
    checkpointing: bool
    passes: int
    fused: bool
    rounded: bool


@lru_cache(maxsize=64)  # tracing a large model takes seconds, and `edt init` tries several micro-batches of one model
def _sample_bytes(config: ModelConfig, trace: _Trace) -> tuple[Saved, Saved]:
    """What the first sample of a micro-batch saves for the backward pass, and each further one."""
    model = shadow(config).train()
    model.activation_checkpointing = trace.checkpointing
    model.stream_dtype = torch.bfloat16 if trace.rounded else None
    first, both = (saved(model, samples, trace.passes, trace.precision, fused=trace.fused) for samples in (1, 2))
    return first, Saved(both.activations - first.activations, both.scores - first.scores)


def saved(
    model: DiffusionTransformer, samples: int, passes: int, precision: str = "fp32", *, fused: bool = False
) -> Saved:
    """What a forward pass saves for the backward pass, measured on a model without storage (device "meta").

    Each saved storage counts once; weights do not count, their copies in bf16 do. With two passes the second one is
    masked. In bf16 each tensor has the dtype that autocast gives it: the inputs of norms are float32, and so is the
    residual stream unless the model has a `stream_dtype`. With `fused`, attention scores are not counted: a GPU's
    kernels compute them again.
    """
    sizes: dict[int, int] = {}
    config, rows = model.config, samples * passes
    masks = draw_masks(config, samples, torch.Generator().manual_seed(0)) if passes == 2 else None
    with FakeTensorMode() as mode, _Scores() as scores:
        tensors = _fake_tensors(model)
        own = {tensor.untyped_storage()._cdata for tensor in tensors.values()}

        def record(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own and not (fused and storage._cdata in scores.tensors):
                sizes[storage._cdata] = storage.nbytes()
            return tensor.detach()  # a node that saved its own output would keep itself, and all before it, for good

        x = torch.empty(rows, config.in_channels, config.latent_size, config.latent_size)
        t, y = (torch.zeros(rows, dtype=torch.int64) for _ in range(2))
        fakes = None if masks is None else [mode.from_tensor(mask) for mask in masks]
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), autocast:
            torch.func.functional_call(model, tensors, (x, t, y, fakes))
    has_bias = any(isinstance(module, RelativePositionBias) for module in model.modules())
    largest = max((tensor.numel() for tensor in scores.tensors.values()), default=0)
    return Saved(sum(sizes.values()), largest * (2 if precision == "bf16" else 4) * has_bias)


class _Scores(TorchDispatchMode):
    """The results of softmax, the scores of attention, and their copies in another dtype, by storage."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}  # kept, so that no other tensor gets a storage of the same number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        is_copy = func is aten._to_copy.default and args[0].untyped_storage()._cdata in self.tensors
        if func is aten._softmax.default or is_copy:
            self.tensors[output.untyped_storage()._cdata] = output.detach()  # `output` itself gets a node later
        return output


def _fake_tensors(model: DiffusionTransformer) -> dict[str, Tensor]:
    """Parameters and buffers of the model's shapes and dtypes on a CPU, without memory; within FakeTensorMode."""
    return {
        **{name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for name, p in model.named_parameters()},
        **{name: torch.empty(b.shape, dtype=b.dtype) for name, b in model.named_buffers()},
    }

"""Estimate of a training's cost before it starts: the model's size, memory, steps. No model is run."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from edt_core.config import TrainConfig
from edt_core.models import (
    DiffusionTransformer,
    ModelConfig,
    count_macs,
    count_parameters,
    draw_masks,
    shadow,
)
from edt_core.training.start.trainable import count_trained, step_flops

_OPTIMIZER_STATES = {"adan": 4, "adamw": 2}  # float32 tensors of the size of the weights
_GIGA = 1e9


@dataclass(frozen=True)
class Estimate:
    """The cost of a training. Bytes are those of one worker; `activations` are saved for one micro-batch's backward."""

    model: str
    parameters: int
    macs: int
    flops_per_image: int
    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    checkpoint: int
    micro_batch: int
    images: int
    global_batch_size: int
    steps: int

    @property
    def memory(self) -> int:
        """Bytes of all tensors of a worker, without the overhead of libraries and kernels."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations

    @property
    def steps_per_epoch(self) -> float:
        return self.images / self.global_batch_size

    def __str__(self) -> str:
        rows = {
            "parameters": f"{self.parameters:,}",
            "MACs per image": f"{self.macs / _GIGA:,.3g} G (the paper's GFLOPs)",
            "training FLOPs per image": f"{self.flops_per_image / _GIGA:,.3g} G",
            "memory per worker": f"about {_size(self.memory)}: weights {_size(self.weights)}, gradients "
            f"{_size(self.gradients)}, optimizer {_size(self.optimizer)}, EMA {_size(self.ema)}, "
            f"activations {_size(self.activations)} (micro-batch {self.micro_batch})",
            "checkpoint": _size(self.checkpoint),
            "images": f"{self.images:,}",
            "steps per epoch": f"{self.steps_per_epoch:,.1f}",
            "steps": f"{self.steps:,} of {self.global_batch_size} images, "
            f"{self.steps * self.global_batch_size / self.images:,.1f} epochs",
        }
        return "\n".join([self.model, *(f"  {name:<25} {value}" for name, value in rows.items())])


def _size(number: int) -> str:
    """A number of bytes as text, in GiB or MiB."""
    return f"{number / (1 << 30):,.2f} GiB" if number >= 1 << 30 else f"{number / (1 << 20):,.0f} MiB"


def estimate(config: TrainConfig, model_config: ModelConfig, images: int) -> Estimate:
    """The cost of training a model on a data set of `images` images."""
    parameters, macs = _numbers(model_config)
    weights = 4 * parameters
    trained = weights if config.trainable == "all" else 4 * count_trained(config, model_config)
    optimizer = trained * _OPTIMIZER_STATES[config.optimizer]
    ema = trained * len(config.ema_decays)
    return Estimate(
        model=f"{model_config.name}, {model_config.image_size} px, {model_config.num_classes} classes",
        parameters=parameters,
        macs=macs,
        flops_per_image=step_flops(config, model_config),
        weights=weights,
        gradients=trained,
        optimizer=optimizer,
        ema=ema,
        activations=_activations(model_config, config),
        checkpoint=trained + ema + optimizer,
        micro_batch=config.micro_batch(),
        images=images,
        global_batch_size=config.global_batch_size,
        steps=config.total_steps(images),
    )


def largest_micro_batch(config: TrainConfig, model_config: ModelConfig, memory: int) -> int:
    """The most samples in a forward pass for which the estimate is at most `memory` bytes; 0 if not even one."""
    one, two = (
        estimate(config.model_copy(update={"micro_batch_size": size}), model_config, images=1).memory for size in (1, 2)
    )
    return max(0, 1 + (memory - one) // max(two - one, 1))


@lru_cache(maxsize=64)
def _numbers(config: ModelConfig) -> tuple[int, int]:
    """Parameters and multiply-accumulates of a model."""
    model = shadow(config)
    return count_parameters(model), count_macs(model)


def _activations(model_config: ModelConfig, config: TrainConfig) -> int:
    """Bytes saved for the backward pass of a micro-batch.

    In bf16 the estimate counts everything in half precision, although autocast computes norms and losses in float32.
    It includes the attention scores, which a GPU's fused kernels do not save: on a GPU, a sixth less is used.
    """
    first, further = _sample_bytes(model_config, config.activation_checkpointing, config.passes)
    total = first + further * (config.micro_batch() - 1)
    return total // 2 if config.precision == "bf16" else total


@lru_cache(maxsize=64)  # tracing a large model takes seconds, and `edt init` tries several micro-batches of one model
def _sample_bytes(config: ModelConfig, checkpointing: bool, passes: int) -> tuple[int, int]:
    """Bytes saved for the backward pass of the first sample of a micro-batch, and of each further one."""
    model = shadow(config).train()
    model.activation_checkpointing = checkpointing
    first, both = (saved_bytes(model, samples, passes) for samples in (1, 2))
    return first, both - first


def saved_bytes(model: DiffusionTransformer, samples: int, passes: int) -> int:
    """Bytes that a forward pass saves for the backward pass, measured on a model without storage (device "meta").

    Each saved storage counts once; weights do not count. With two passes the second one is masked.
    """
    sizes: dict[int, int] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    config, rows, device = model.config, samples * passes, torch.device("meta")
    x = torch.empty(rows, config.in_channels, config.latent_size, config.latent_size, device=device)
    t, y = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
    masks = draw_masks(config, samples, torch.Generator().manual_seed(0), device) if passes == 2 else None
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model(x, t, y, masks)
    return sum(sizes.values())

"""Fine-tuning of few parameters: DiffFit (arXiv 2304.06648), or biases alone.

A checkpoint of such a training holds the trained tensors (the delta) and the digest of its base model, not the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edt_core.errors import UserError
from edt_core.models import (
    FAMILIES,
    DiffusionTransformer,
    ModelConfig,
    count_parameters,
    macs_of,
    shadow,
    training_flops,
)
from edt_core.training.align.cost import align_flops
from edt_core.training.distill.teacher import teacher_flops

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

_GAMMA = "gamma"
# The two residual branches of a block, and the last projection of each, which takes up the branch's scale.
_BRANCHES = {"attn": "proj", "mlp": "fc2"}


def prepare_trainable(model: DiffusionTransformer, trainable: str) -> frozenset[str] | None:
    """Freeze what `train.trainable` does not name, and return the names of the trained tensors; None for all of them.

    "difffit" trains biases, the class table, the parameters of norms, and a new scale per channel, 1 at first, of both
    residual branches of each block; "bias" trains biases and the class table. Tables of relative position biases are
    weights, and stay frozen.
    """
    if trainable == "all":
        return None
    if trainable == "difffit":
        _add_scales(model)
    names = frozenset(name for name, _ in model.named_parameters() if _is_trained(model, name, trainable))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return names


def count_trained(config: TrainConfig, model_config: ModelConfig) -> int:
    """Number of parameters that a training changes."""
    return _counted(model_config, config.trainable)[0]


def count_merged(config: TrainConfig, model_config: ModelConfig) -> int:
    """Number of parameters of the ordinary model that are not those of the training or of its average: see `merged`."""
    return _counted(model_config, config.trainable)[1]


@lru_cache(maxsize=64)
def _counted(model_config: ModelConfig, trainable: str) -> tuple[int, int]:
    model = shadow(model_config)
    prepare_trainable(model, trainable)
    own = model.state_dict()
    return count_parameters(model), sum(value.numel() for name, value in merged(own).items() if value is not own[name])


def step_flops(config: TrainConfig, model_config: ModelConfig) -> int:
    """Floating-point operations of training on one image, without the gradients of frozen weights.

    With `train.align` those of its head and of its target are included, and with `train.distill` those of the teacher.
    """
    align = align_flops(config, model_config)
    if config.distill is not None:
        teacher = teacher_flops(config, macs_of(model_config))
        return training_flops(model_config, masked=False) + teacher
    if config.trainable == "all":
        return training_flops(model_config, masked=config.masked_loss) + align
    return training_flops(model_config, masked=config.masked_loss, prepare=_preparation(config.trainable)) + align


@cache
def _preparation(trainable: str) -> Callable[[DiffusionTransformer], object]:
    """`prepare_trainable`, one function for each value: what is counted with it is remembered."""
    return partial(prepare_trainable, trainable=trainable)


def _is_trained(model: DiffusionTransformer, name: str, trainable: str) -> bool:
    owner, _, last = name.rpartition(".")
    if last == "bias" or name == FAMILIES[model.config.architecture].released.labels:
        return True
    return trainable == "difffit" and (last == _GAMMA or isinstance(model.get_submodule(owner), nn.LayerNorm))


def _add_scales(model: DiffusionTransformer) -> None:
    for block in list(model.modules()):
        for branch, projection in _BRANCHES.items() if all(hasattr(block, name) for name in _BRANCHES) else ():
            module = getattr(block, branch)
            bias = getattr(module, projection).bias
            module.register_parameter(_GAMMA, nn.Parameter(torch.ones_like(bias)))
            module.register_forward_hook(_scaled)


def _scaled(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output * module.get_parameter(_GAMMA).to(output.dtype)


def without_scales(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict that a model without scales has."""
    return {name: value for name, value in weights.items() if not _is_scale(name)}


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the ordinary model that computes the same: each scale is in the last projection of its branch.

    gamma (W x + b) = (gamma W) x + gamma b, with gamma [D], W [D, D'] and b [D].
    """
    plain = without_scales(weights)
    for name in weights.keys() - plain.keys():
        branch = name.removesuffix(f".{_GAMMA}")
        projection = f"{branch}.{_BRANCHES[branch.rpartition('.')[2]]}"
        gamma = weights[name]
        plain[f"{projection}.weight"] = plain[f"{projection}.weight"] * gamma.unsqueeze(1)
        plain[f"{projection}.bias"] = plain[f"{projection}.bias"] * gamma
    return plain


def unmerged(weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `merged`, up to rounding: the scales among the tensors `scales` are taken out of the weights again.

    Raises UserError for a scale of 0, which cannot be.
    """
    apart = dict(weights)
    for name, gamma in scales.items():
        if _is_scale(name):
            branch = name.removesuffix(f".{_GAMMA}")
            projection = f"{branch}.{_BRANCHES[branch.rpartition('.')[2]]}"
            if bool((gamma == 0).any()):
                raise UserError(f"the scale {name} of the fine-tuned model has a 0, so its base model is not in it")
            apart[name] = gamma
            apart[f"{projection}.weight"] = apart[f"{projection}.weight"] / gamma.unsqueeze(1)
            apart[f"{projection}.bias"] = apart[f"{projection}.bias"] / gamma
    return apart


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] == _GAMMA

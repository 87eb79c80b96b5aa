"""What a model costs: parameters and multiply-accumulates. Pure functions of a model; nothing is run.

Legend: T = n² tokens of a layer's grid, D = its width.
"""

from __future__ import annotations

import torch
from torch import nn

from edt_core.models.attention import Block
from edt_core.models.config import ModelConfig
from edt_core.models.edt import EDT
from edt_core.models.layers import DownSample, SkipConnection, UpSample


def shadow(config: ModelConfig) -> EDT:
    """An EDT whose tensors have shapes and no memory, to count on (device "meta")."""
    with torch.device("meta"):
        return EDT(config)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_macs(model: EDT) -> int:
    """Multiply-accumulates of one forward pass for one image; a billion of them is the paper's "GFLOP".

    Counted are matrix products: each linear or convolution weight once for every row it is applied to (all
    tokens, or one where it acts on the conditioning), and in attention T²·D each for the scores and for the
    weighted sum. Not counted are biases, norms, activations, softmax, modulation, look-ups and gates.
    """
    tokens = model.config.stages[0].grid ** 2
    final = model.final_layer
    embedding = tokens * _weights(model.x_embedder) + _weights(model.t_embedder)
    output = tokens * _weights(final.linear) + _weights(final.adaLN_modulation)
    return embedding + sum(_module_macs(module) for module in model.modules()) + output


def _module_macs(module: nn.Module) -> int:
    """MACs of one module of the hourglass; 0 for everything else, parts of such modules included."""
    match module:
        case Block():
            tokens, dim = module.attn.grid**2, module.attn.proj.in_features
            per_token = _weights(module.attn) + _weights(module.mlp)
            return tokens * per_token + 2 * tokens**2 * dim + _weights(module.adaLN_modulation)
        case DownSample():
            return (module.grid // 2) ** 2 * _weights(module.reduction) + _weights(module.adaLN_modulation)
        case UpSample():
            return module.grid**2 * _weights(module.expand)
        case SkipConnection():
            return module.grid**2 * _weights(module.cat) + _weights(module.adaLN_modulation)
        case _:
            return 0


def _weights(module: nn.Module) -> int:
    """Number of weights, without biases, in the linear and convolution layers of a module."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d))

"""The weights of a base model, adapted to a model of other classes and another image size.

Legend: n = side of a square of tokens, T = n² tokens, D = width, H = heads.
"""

import math
from collections.abc import Iterable, Sequence
from hashlib import sha256

import torch
from torch import Tensor
from torch.nn import functional as F

from edt_core.errors import UserError
from edt_core.models import FAMILIES, DiffusionTransformer
from edt_core.models.attention import RelativePositionBias
from edt_core.training.start.base import Base, ClassRows
from edt_core.training.start.trainable import without_scales

_LEAST_SPREAD = 0.02  # of class rows: that of new models


def label_table(model: DiffusionTransformer) -> str:
    """The name of the class table in a model's state dict; its last row is the null class."""
    return FAMILIES[model.config.architecture].released.labels


def adapted_weights(
    base: Base, model: DiffusionTransformer, rows: ClassRows, names: Sequence[str], seed: int
) -> dict[str, Tensor]:
    """A state dict for `model`, float32, from the weights of a base model that `check_fit` has let pass.

    Class rows go as `rows` says. Tensors that depend on the image size are recomputed if they are fixed, and
    interpolated if they are learned. Raises UserError for tensors that are missing, superfluous, or that do not fit.
    """
    own = without_scales(model.state_dict())
    _check_names(base, own.keys())
    fixed = {name for name, _ in model.named_buffers()}
    tables = {
        f"{name}.relative_position_bias_table": module.span
        for name, module in model.named_modules()
        if isinstance(module, RelativePositionBias)
    }
    labels, adapted = label_table(model), {}
    for name, value in own.items():
        tensor = base.weights[name]
        if name == labels:
            adapted[name] = class_table(tensor.float(), rows, names, seed)
        elif tensor.shape == value.shape:
            adapted[name] = tensor.to(value.dtype)
        elif name in fixed:
            adapted[name] = value
        elif name in tables:
            adapted[name] = resized_bias(tensor.float(), tables[name], len(value))
        elif tensor.ndim == 3:
            adapted[name] = resized_positions(tensor.float(), base.config.grid, model.config.grid)
        if name not in adapted or adapted[name].shape != value.shape:
            raise UserError(
                f"train.init_from: {base.origin}: {name} has shape {list(tensor.shape)}, and the new model needs "
                f"{list(value.shape)}; start from a model of the same kind"
            )
    return adapted


def _check_names(base: Base, own: Iterable[str]) -> None:
    expected = set(own)
    missing, extra = sorted(expected - base.weights.keys()), sorted(base.weights.keys() - expected)
    if missing or extra:
        raise UserError(
            f"train.init_from: {base.origin} does not hold the weights of a {base.config.name}: {len(missing)} tensors "
            f"are missing {missing[:3]}, {len(extra)} are too many {extra[:3]}; give the model that was written whole"
        )


def class_table(table: Tensor, rows: ClassRows, names: Sequence[str], seed: int) -> Tensor:
    """The class table [K + 1, D] of the new model from that of the base model [K' + 1, D]; the null row is the last.

    A new class begins as the mean of all class rows + s N(0, 1), drawn from the seed and its name. s is the root mean
    square of the rows' distances from their mean, so that a new class is as distinct as a trained one: from nearly
    equal rows, a short training learns a mixture of the new classes.
    """
    trained = table[:-1].double()
    mean = trained.mean(dim=0)
    spread = max((trained - mean).square().mean().sqrt().item(), _LEAST_SPREAD)
    class_rows = [
        table[row]
        if row is not None
        else (mean + spread * _class_noise(seed, names[label], table.shape[1]).double()).to(table.dtype)
        for label, row in enumerate(rows.rows)
    ]
    return torch.stack([*class_rows, table[-1]])


def _class_noise(seed: int, name: str, width: int) -> Tensor:
    digest = sha256(f"{seed}\n{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(width, generator=generator)


def resized_positions(embedding: Tensor, before: int, after: int) -> Tensor:
    """A learned position embedding [1, e + T, D] for another grid, bicubic as for ViTs (arXiv 2012.12877).

    The first e tokens have no place on the grid and are copied.
    """
    extra = embedding.shape[1] - before**2
    first, places = embedding[:, :extra], embedding[:, extra:]
    grid = places.transpose(1, 2).unflatten(2, (before, before))
    return torch.cat([first, _bicubic(grid, after).flatten(2).transpose(1, 2)], dim=1)


def resized_bias(table: Tensor, span: int, length: int) -> Tensor:
    """A table of relative position biases [(2n-1)² + s, H] for another grid of span 2m-1, bicubic as in Swin.

    The last s rows are of pairs without an offset and are copied. `length` is that of the new table.
    """
    spare = length - span**2
    offsets = len(table) - spare
    before = math.isqrt(offsets)
    grid = table[:offsets].t().unflatten(1, (before, before)).unsqueeze(0)
    return torch.cat([_bicubic(grid, span).squeeze(0).flatten(1).t(), table[offsets:]])


def _bicubic(grid: Tensor, side: int) -> Tensor:
    # In float64 every processor's kernel gives the same float32 values, but for rare last bits.
    resized = F.interpolate(grid.double(), size=(side, side), mode="bicubic", align_corners=False)
    return resized.to(grid.dtype)

"""muP, the maximal update parametrisation (arXiv 2203.03466): a learning rate of a narrow model fits wide ones.

For a model m times as wide as its base, Adam's rate of each matrix whose inputs grow with the width is divided by m:
of hidden matrices, as in the paper's table 8, and of the output. Table 8 gives the output the whole rate and divides
what it computes by m. That is the same training: the steps of Adam and Adan do not depend on the scale of a gradient if
eps has that scale too, so it is multiplied by m here. Without a factor in the model, it is an ordinary one wherever it
is loaded. Weight decay is multiplied by m, so that its product with the rate stays. Biases, embeddings, bias tables and
the class table have the whole rate. Attention scales scores by the width of a head, which is the same for all widths.

Muon's step of a matrix has the spectral norm 0.2 sqrt(max(rows, columns)) times the rate, which grows with the square
root of the width, where Adam's grows with the width: its rate is divided by sqrt(m).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import Tensor, nn

from edt_core.errors import UserError
from edt_core.models import FAMILIES, DiffusionTransformer, ModelConfig, shadow
from edt_core.models.families.adaln import AdaLNTransformer
from edt_core.training.optim import Scale

if TYPE_CHECKING:
    from edt_core.config import TrainConfig


def check_mup(config: TrainConfig, model_config: ModelConfig) -> None:
    """Raise UserError if `train.mup_base_width` does not apply to the model or to the rest of the recipe."""
    base = config.mup_base_width
    if base is None:
        return
    if not issubclass(FAMILIES[model_config.architecture].model, AdaLNTransformer):
        raise UserError(
            f"train.mup_base_width is {base}, but {model_config.name} has other initial weights than muP is known for "
            "here; leave it out, or train an EDT, a DiT or an MDTv2"
        )
    if config.align is not None:
        raise UserError(
            f"train.mup_base_width is {base}, but train.align is {config.align}, whose head has no muP; leave one out"
        )
    try:
        model_config.with_width(base)
    except ValueError as error:
        raise UserError(f"train.mup_base_width is no width of this model. {error}") from error


def width_ratio(config: TrainConfig, model_config: ModelConfig) -> float:
    """How many times as wide as muP's base the model is; 1 without muP."""
    return 1.0 if config.mup_base_width is None else model_config.cond_dim / config.mup_base_width


def fitted(model: DiffusionTransformer, config: TrainConfig) -> DiffusionTransformer:
    """The new model with muP's initial weights, which are its own at the base width and without muP."""
    ratio = width_ratio(config, model.config)
    if ratio != 1.0:
        assert isinstance(model, AdaLNTransformer), "see check_mup"
        model.fit_to_base_width(ratio)
    return model


def mup_scales(
    config: TrainConfig, model: DiffusionTransformer, matrices: Collection[Tensor] = ()
) -> dict[Tensor, Scale]:
    """The scales of the rates of weights; those that have the whole rate are left out.

    `matrices` are the weights that Muon would train.
    """
    ratio = width_ratio(config, model.config)
    if ratio == 1.0:
        return {}
    hidden = Scale(1.0 / ratio)
    orthogonal = dict.fromkeys(matrices if config.optimizer == "muon" else (), Scale(ratio**-0.5))
    wider = dict(shadow(model.built_config.with_width(2 * model.built_config.cond_dim)).named_modules())
    scales = {}
    for name, module in model.named_modules():
        other = wider.get(name)
        if isinstance(module, nn.Linear) and isinstance(other, nn.Linear) and other.in_features != module.in_features:
            is_output = other.out_features == module.out_features
            scales[module.weight] = Scale(1.0 / ratio, ratio) if is_output else orthogonal.get(module.weight, hidden)
    return scales

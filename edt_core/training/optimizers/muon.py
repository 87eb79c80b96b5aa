"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): orthogonal steps for the blocks' matrices.

A matrix's step is its momentum G with all singular values brought close to 1, by the iteration
X <- a X + (b A + c A A) X with A = X X', from X = G / |G|. It is scaled by 0.2 sqrt(max(rows, columns)) as in Moonlight
(arXiv 2502.16982): its root mean square is then about 0.2, that of a step of AdamW, and both take one learning
rate. All other parameters are AdamW's.

Legend: n matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from edt_core.models import DiffusionTransformer

_HIDDEN = frozenset(("attention", "feed-forward", "down", "up", "skip"))  # kinds of modules
_QKV = ".qkv"
_A, _B, _C, _ITERATIONS, _LEAST_NORM = 3.4445, -4.7750, 2.0315, 5, 1e-7
_RMS = 0.2
_ADAMW = ("exp_avg", "exp_avg_sq", "step")


def hidden_matrices(model: DiffusionTransformer) -> dict[Tensor, int]:
    """The weights [R, C] that Muon trains, and the number of matrices in each: 3 for queries, keys and values, else 1.

    They are those of all linear layers between tokens. Embeddings, the class table, adaLN, whose outputs are the shifts
    and scales of norms, and the final layer are not among them.
    """
    return {
        module.weight: 3 if name.endswith(_QKV) else 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and model.kind(name) in _HIDDEN
    }


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices [n, R, C] with their singular vectors, and singular values of about 0.7 to 1.2; zeros stay zeros.

    The products are in bfloat16 on a GPU, as the authors', and in float32 on a CPU, where that is as fast.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_LEAST_NORM)
    x = x.to(torch.bfloat16) if x.is_cuda else x
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for the parameters in `matrices`, by the number of matrices that lie above one another in each; else AdamW.

    A group's `parts` is that number, 0 for AdamW. Betas are those of both papers, weight decay is decoupled. Groups of
    parameters with settings of their own are divided further.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Sequence[Mapping[str, Any]],
        matrices: Mapping[Tensor, int],
        *,
        lr: float,
        weight_decay: float = 0.0,
    ) -> None:
        listed = list(parameters)
        given = [group for group in listed if isinstance(group, Mapping)] or [{"params": listed}]
        groups = list[dict[str, Any]]()
        for group in given:
            by_parts = defaultdict[int, list[Tensor]](list)
            for parameter in group["params"]:
                by_parts[matrices.get(parameter, 0)].append(parameter)
            groups += [{**group, "params": by_parts[parts], "parts": parts} for parts in by_parts]
        groups.sort(key=lambda group: -int(group["parts"]))
        on_gpu = any(parameter.is_cuda for group in groups for parameter in group["params"])
        form = {"foreach": not on_gpu, "fused": on_gpu}
        settings = {"momentum": 0.95, "betas": (0.9, 0.95), "eps": 1e-8}
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, **settings, **form})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the gradients, which stay as they are."""
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if trained and group["parts"]:
                self._orthogonal_step(group, trained)
            elif trained:
                self._adamw_step(group, trained)

    def _orthogonal_step(self, group: dict[str, Any], trained: list[Tensor]) -> None:
        for parameter in trained:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in trained]
        torch._foreach_lerp_(momenta, gradients, 1.0 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
        torch._foreach_mul_(trained, 1.0 - group["lr"] * group["weight_decay"])
        of_shape = defaultdict[torch.Size, list[int]](list)
        for index, parameter in enumerate(trained):
            of_shape[parameter.shape].append(index)
        for (rows, columns), indices in of_shape.items():  # one product for all matrices of a shape
            stacked = torch.stack([nesterov[index] for index in indices])
            single = stacked.view(-1, rows // group["parts"], columns)
            rate = group["lr"] * _RMS * math.sqrt(max(single.shape[1:]))
            steps = orthogonalized(single).view(stacked.shape).unbind()
            torch._foreach_add_([trained[index] for index in indices], list(steps), alpha=-rate)

    def _adamw_step(self, group: dict[str, Any], trained: list[Tensor]) -> None:
        for parameter in trained:
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in _ADAMW[:2]}
                step = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
                self.state[parameter].update({**moments, "step": step})
        means, squares, steps = ([self.state[parameter][name] for parameter in trained] for name in _ADAMW)
        beta1, beta2 = group["betas"]
        adamw(
            trained,
            [parameter.grad for parameter in trained if parameter.grad is not None],
            means,
            squares,
            [],
            steps,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            maximize=False,
            **{name: group[name] for name in ("lr", "weight_decay", "eps", "foreach", "fused")},
        )

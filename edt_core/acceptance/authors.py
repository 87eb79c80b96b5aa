"""A plain training step to compare ours with, as EDT's authors do it (their code is built on DiT), and their model.

The same model and the same losses, eager and in float32 (TF32 on a GPU): explicit attention scores, the relative
position bias looked up by a precomputed index, two forward passes, and an optimizer and an average that go parameter by
parameter.

Legend: N samples, T tokens, D width, H heads, d = D/H.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edt_core.diffusion import linear_schedule, objective_of
from edt_core.models import DiffusionTransformer
from edt_core.models.attention import Attention
from edt_core.models.kernels import TokenLinear
from edt_core.precision import use_precision
from edt_core.training.step import StepInputs

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

MODELS_FILE = "models_edt.py"  # in a checkout of github.com/xinwangChen/EDT
AMM_BLOCKS = (7, 10)  # of EDT-S in that file


class PlainAttention(nn.Module):
    """Multi-head self-attention with the weights of an `Attention`, as DiT and Swin write it (arXiv 2103.14030)."""

    pairs: Tensor | None

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.rel_pos_bias, self.qkv, self.proj = attention.rel_pos_bias, attention.qkv, attention.proj
        pairs = None
        if attention.rel_pos_bias is not None:
            places = torch.arange(attention.grid**2, device=attention.rel_pos_bias.offsets.device)
            pairs = attention.rel_pos_bias.pairs(places)
        self.register_buffer("pairs", pairs, persistent=False)  # [T, T], rows of the table

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Attend: [N, T, D] -> [N, T, D]; with `kept`, int64 [N, T], only these tokens of the grid."""
        samples, tokens, width = x.shape
        qkv = self.qkv(x).reshape(samples, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # N, H, T, d each
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if self.rel_pos_bias is not None and self.pairs is not None:
            pairs = self.pairs if kept is None else self.pairs[kept.unsqueeze(2), kept.unsqueeze(1)]
            bias = self.rel_pos_bias.relative_position_bias_table[pairs]  # [T, T, H], or of each sample
            scores = scores + bias.movedim(-1, -3)
        mixed = scores.softmax(dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(samples, tokens, width))


def plain_model(model: DiffusionTransformer) -> DiffusionTransformer:
    """A copy of a model whose attention and linear layers are the plain ones, in training mode."""
    plain = copy.deepcopy(model)
    for parent in list(plain.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Attention):
                setattr(parent, name, PlainAttention(child))
            elif isinstance(child, TokenLinear):
                setattr(parent, name, _plain_linear(child))
    return plain.train()


def _plain_linear(layer: nn.Linear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    return linear


def plain_optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Adan parameter by parameter; AdamW where pytorch_optimizer is not installed."""
    try:
        from pytorch_optimizer import Adan
    except ImportError:
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, foreach=False)
    return Adan(parameters, lr=config.lr, weight_decay=config.weight_decay, foreach=False)


class PlainStep:
    """The step, repeated on the same inputs; `ema` contains the averages of the parameters."""

    def __init__(self, config: TrainConfig, model: DiffusionTransformer, inputs: StepInputs) -> None:
        self.config, self.inputs = config, inputs
        self.model = plain_model(model)
        self.null_label = model.config.num_classes
        self.schedule = linear_schedule(config.num_timesteps)
        parameters = list(self.model.parameters())
        self.optimizer = plain_optimizer(config, parameters)
        self.ema = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def __call__(self) -> Tensor:
        """One step; the losses of the full and the masked pass for each sample, [2, N]."""
        use_precision("tf32" if self.inputs.latents.is_cuda else "fp32")
        losses = [self._losses(0, None), self._losses(1, list(self.inputs.draws.masks))]
        loss = (losses[0] * self.inputs.weights).mean() + (losses[1] * self.inputs.weights).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self._update_ema()
        return torch.stack(losses).detach()

    def _losses(self, number: int, masks: list[Tensor] | None) -> Tensor:
        """The losses of one pass, [N], with its own noise and dropped labels."""
        inputs, draws = self.inputs, self.inputs.draws
        y = torch.where(draws.drop_label[number], self.null_label, inputs.labels)
        objective = objective_of("epsilon")
        x_t = objective.noised(self.schedule, inputs.latents, inputs.timesteps, draws.noise[number])
        output = self.model(x_t, inputs.timesteps, y, masks)
        return objective.losses(
            self.schedule,
            output,
            inputs.latents,
            x_t,
            draws.noise[number],
            inputs.timesteps,
            min_snr_gamma=self.config.min_snr_gamma,
        ).loss

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = self.config.ema_decays[0]
        for name, parameter in self.model.named_parameters():
            self.ema[name].mul_(decay).add_(parameter, alpha=1 - decay)


# --- the authors' own code, from a checkout of theirs


def load_model(checkout: Path, name: str, ours: DiffusionTransformer) -> nn.Module:
    """A model of the authors' code by its name in their file, with the weights of ours. It runs that file's code."""
    with _stand_ins():
        module = _run_file(checkout / MODELS_FILE)
    theirs: nn.Module = module.EDT_models[name]()
    theirs.load_state_dict(ours.state_dict())
    return theirs


class AuthorsStep:
    """A step of the authors' model on random inputs: a full and a masked pass, backward, AdamW by lists.

    Their loss is replaced by the squared error of the noise; it takes none of the time.
    """

    def __init__(self, checkout: Path, name: str, ours: DiffusionTransformer, batch: int, device: torch.device) -> None:
        self.model = load_model(checkout, f"{name}_noAMM", ours).to(device).train()
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=1e-4, foreach=True
        )
        config = ours.config
        self.x = torch.randn(batch, config.in_channels, config.latent_size, config.latent_size, device=device)
        self.noise = torch.randn(batch, config.out_channels, config.latent_size, config.latent_size, device=device)
        self.t = torch.randint(1000, (batch,), device=device)
        self.y = torch.randint(config.num_classes, (batch,), device=device)

    def __call__(self) -> None:
        """One step."""
        self.optimizer.zero_grad()
        full = (self.model(self.x, self.t, self.y) - self.noise).square().mean()
        masked = (self.model(self.x, self.t, self.y, enable_down_mask=True) - self.noise).square().mean()
        (full + masked).backward()
        self.optimizer.step()


def _run_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("edt_authors_models", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Context with modules in place of timm and einops where they are not installed: the few names that are used."""
    layers: dict[str, object] = {
        "PatchEmbed": _PatchEmbed,
        "Mlp": _Mlp,
        "Attention": nn.Module,
    }
    helpers: dict[str, object] = {
        "DropPath": nn.Identity,
        "to_2tuple": _pair,
        "trunc_normal_": nn.init.trunc_normal_,
    }
    modules: dict[str, dict[str, object]] = {
        "timm": {},
        "timm.models": {},
        "timm.models.vision_transformer": layers,
        "timm.models.layers": helpers,
        "einops": {"rearrange": _split_cells},
    }
    missing = {name: names for name, names in modules.items() if not _is_installed(name.partition(".")[0])}
    for name, names in missing.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(names)
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def _is_installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _pair(value: int) -> tuple[int, int]:
    return value, value


def _split_cells(x: Tensor, pattern: str, *, p1: int, p2: int, c: int) -> Tensor:
    """The one rearrangement that the authors' model uses: channels to cells of p1 x p2 tokens."""
    assert pattern == "b h w (p1 p2 c)-> b (h p1) (w p2) c", pattern
    images, rows, columns, _ = x.shape
    cells = x.reshape(images, rows, columns, p1, p2, c).permute(0, 1, 3, 2, 4, 5)
    return cells.reshape(images, rows * p1, columns * p2, c)


class _PatchEmbed(nn.Module):
    """Patches to tokens: [N, C, h, h] -> [N, T, D]."""

    def __init__(self, size: int, patch_size: int, channels: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = _pair(patch_size)
        self.num_patches = (size // patch_size) ** 2
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x)
        return patches.flatten(2).transpose(1, 2)


class _Mlp(nn.Module):
    """Two linear layers around an activation."""

    def __init__(
        self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module], drop: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out

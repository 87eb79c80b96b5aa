"""A plain training step to compare ours with, as EDT's authors do it (their code is built on DiT).

The same model and the same losses, eager and in float32 (TF32 on a GPU): explicit attention scores, the relative
position bias looked up by a precomputed index, two forward passes, and an optimizer and an average that go parameter by
parameter.

Legend: N samples, T tokens, D width, H heads, d = D/H.
"""

import copy

import torch
from pytorch_optimizer import Adan
from torch import Tensor, nn

from edt_core.config import TrainConfig
from edt_core.diffusion import linear_schedule, objective_of
from edt_core.models import DiffusionTransformer
from edt_core.models.attention import Attention
from edt_core.models.kernels import TokenLinear
from edt_core.precision import use_precision
from edt_core.training.step import StepInputs


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


class PlainStep:
    """The step, repeated on the same inputs; `ema` contains the averages of the parameters."""

    def __init__(self, config: TrainConfig, model: DiffusionTransformer, inputs: StepInputs) -> None:
        self.config, self.inputs = config, inputs
        self.model = plain_model(model)
        self.null_label = model.config.num_classes
        self.schedule = linear_schedule(config.num_timesteps)
        parameters = list(self.model.parameters())
        self.optimizer = Adan(parameters, lr=config.lr, weight_decay=config.weight_decay, foreach=False)
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

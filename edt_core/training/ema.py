"""Exponential moving average of the weights."""

import torch
from torch import Tensor, nn


class EMA:
    """float32 averages of a model's state: average <- decay * average + (1 - decay) * value.

    Fixed position embeddings are part of the state dict and average to themselves.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: value.detach().float().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One update over all tensors in one fused call."""
        values = [value.detach().float() for value in model.state_dict().values()]
        torch._foreach_lerp_(list(self.average.values()), values, 1.0 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.average)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises KeyError unless the names are those of the model."""
        for name, average in self.average.items():
            average.copy_(state[name])

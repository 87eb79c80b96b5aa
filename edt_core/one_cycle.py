"""Learning-rate schedule of the small fits: autoencoder and classifier."""

import torch


def one_cycle(optimizer: torch.optim.Optimizer, lr: float, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """A schedule that rises to `lr` in a tenth of the steps, then falls to almost 0."""
    rise = 0.1 if steps != 10 else 0.11  # torch divides by `rise * steps - 1`
    # torch starts a cycle of one step at its end, where the rate is almost 0 and nothing would be fitted.
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=rise)

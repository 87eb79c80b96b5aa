"""Distances between a head's output and its target, per sample.

Legend: N = batch, T = tokens, K = features of a token.
"""

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional as F

_BETA = 0.05  # of the smooth L1 distance, as in SRA's code (github.com/vvvvvjdy/SRA)


def smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean smooth L1 distance [N] of [N, T, K] (SRA, arXiv 2505.02831, eq. 5)."""
    return F.smooth_l1_loss(prediction, target, beta=_BETA, reduction="none").flatten(1).mean(1)


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of each token's features, mean over tokens, [N] (REPA, arXiv 2410.06940, eq. 8, plus 1)."""
    return 1.0 - F.cosine_similarity(prediction, target, dim=2).mean(1)


def channel_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine of each feature over all tokens, mean over features, [N].

    It is what SRA's code computes for its option "cos": the default dimension of PyTorch's function is that of tokens.
    """
    return 1.0 - F.cosine_similarity(prediction, target, dim=1).mean(1)


DISTANCES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth_l1": smooth_l1,
    "cosine": cosine,
    "channel_cosine": channel_cosine,
}

"""What of a training fits on the GPUs that people have, with and without `train.shard`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edt_core.models import ModelConfig
from edt_core.training.estimate import estimate, largest_micro_batch, size_text

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

_CARDS = (24, 40, 80)  # GiB
_ROOM = 0.8  # share of a GPU's memory that an estimate may take, as in `edt doctor`


def card_rows(config: TrainConfig, model_config: ModelConfig) -> str:
    """Lines for an estimate of a training on GPUs: its state, and the micro-batch that fits on each card; else "".

    With several workers also those of the other values of `shard`, for the fewest workers that the training may have.
    """
    if not config.use_gpu:
        return ""
    modes = ["none"]
    if config.worker_range[0] > 1:
        modes += ["optimizer"] if config.refusal_of_full() else ["optimizer", "full"]
    configs = [config.model_copy(update={"shard": mode}) for mode in modes]
    states = [size_text(estimate(each, model_config, images=1).state) for each in configs]
    rows = {"state per worker": _joined(modes, states)}
    for card in _CARDS:
        largest = [largest_micro_batch(each, model_config, int(_ROOM * (card << 30))) for each in configs]
        texts = [f"micro-batch {samples:,}" if samples else "no micro-batch" for samples in largest]
        rows[f"fits on {card} GB"] = _joined(modes, texts)
    return "".join(f"\n  {name:<25} {value}" for name, value in rows.items())


def _joined(modes: Sequence[str], texts: Sequence[str]) -> str:
    return "; ".join(
        [texts[0], *(f"with shard {mode} {text}" for mode, text in zip(modes[1:], texts[1:], strict=True))]
    )

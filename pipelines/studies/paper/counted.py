"""Tables of the paper that are counted from the models, without training: sizes, a block, the cost of training."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from edt_core.models import ModelConfig, count_parameters, macs_of, shadow
from edt_core.models.cost import macs_by_part
from edt_core.training.start.trainable import step_flops
from pipelines.config.schema import PipelineConfig
from pipelines.studies.paper.price import CLASSES, IMAGES
from pipelines.studies.paper.table import Kind

_SECONDS_A_DAY = 86_400
Cells = tuple[str, str]  # heading, text


def counted_rows(kind: Kind, configs: Sequence[PipelineConfig], tflops: float) -> dict[str, list[Cells]]:
    """The cells of each row, by registered name. `tflops`: the rate of a GPU that GPU-days are counted with."""
    count: Callable[[PipelineConfig, str, ModelConfig], list[Cells]] = {
        "sizes": lambda config, name, model: _sizes(model),
        "block": lambda config, name, model: _block(model),
        "cost": lambda config, name, model: _cost(config, name, model, tflops),
    }[kind]
    return {name: count(c, name, c.model_of(name, CLASSES)) for c in configs for name in c.models}


def _sizes(model: ModelConfig) -> list[Cells]:
    """Parameters of the blocks and of all between them, and what each stage has (table 5)."""
    parts: Counter[str] = Counter()
    for name, parameter in shadow(model).named_parameters():
        parts["blocks" if name.startswith("blocks.") else "sampling and skips" if "_blocks." in name else "ends"] += (
            parameter.numel()
        )
    stages: Any = model
    return [
        ("parameters", f"{sum(parts.values()) / 1e6:.1f} M"),
        *((name, f"{parts[name] / 1e6:.1f} M") for name in ("blocks", "sampling and skips", "ends")),
        ("blocks in each stage", _joined(stages.depths)),
        ("dimensions", _joined(stages.dims)),
        ("heads", _joined(stages.num_heads)),
    ]


def _joined(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _block(model: ModelConfig) -> list[Cells]:
    """Multiply-accumulates of a DiT block by operation: the formula, and what is counted in the model (table 6)."""
    block: Any = model
    n, d = (model.latent_size // model.patch_size) ** 2, block.dim
    parts: Counter[str] = Counter()
    for part in macs_by_part(model):
        if part.place == "blocks":
            parts[part.kind] += part.macs // model.num_blocks
    formulas = {"adaLN": 6 * d * d, "attention": 2 * n * n * d + 4 * n * d * d, "feed-forward": 8 * n * d * d}
    cells = [("n", str(n)), ("d", str(d))]
    for kind, formula in formulas.items():
        cells += [(f"{kind}, formula", f"{formula:,}"), (f"{kind}, counted", f"{parts[kind]:,}")]
    return cells


def _cost(config: PipelineConfig, name: str, model: ModelConfig, tflops: float) -> list[Cells]:
    """Epochs, images, operations and GPU-days of a training (table 7)."""
    train = config.train_of(name)
    images = train.max_steps * train.global_batch_size
    flops = images * step_flops(train, model)
    return [
        ("epochs", f"{images / IMAGES:.1f}"),
        ("images", f"{train.max_steps:,} x {train.global_batch_size}"),
        ("parameters", f"{count_parameters(shadow(model)) / 1e6:.1f} M"),
        ("GMACs", f"{macs_of(model) / 1e9:.2f}"),
        ("training FLOPs", f"{flops:.3g}"),
        (f"GPU-days at {tflops:g} TFLOP/s", f"{flops / (tflops * 1e12) / _SECONDS_A_DAY:.3g}"),
    ]

"""Check that there are enough samples and images for the metrics, before anything is computed."""

import math
from collections.abc import Iterator, Mapping, Sequence

from edt_core.errors import UserError
from edt_core.evaluation.config import EvaluateConfig
from edt_core.evaluation.metrics import space_metrics
from edt_core.evaluation.metrics.sample_size import UNBIASED_FROM, Shortfall, shortfalls


def wanted_metrics(config: EvaluateConfig, space: str, num_samples: int) -> tuple[str, ...] | None:
    """The metrics to compute in a space; None for all. For few samples kid is added to a Fréchet distance."""
    if config.metrics is None:
        return None
    names = tuple(name for name in config.metrics if name in space_metrics(space))
    if "fid" in names and "kid" not in names and num_samples < UNBIASED_FROM:
        names = (*names, "kid")
    return names


def size_shortfalls(
    config: EvaluateConfig,
    dimensions: Mapping[str, int | None],
    num_samples: int,
    images: int | None,
    keep_features: int,
) -> Iterator[Shortfall]:
    """The metrics for which these numbers are too small.

    dimensions: of each feature space, None if unknown. images: number of real images, None if unknown or no limit.
    """
    for space, dims in dimensions.items():
        names = wanted_metrics(config, space, num_samples)
        yield from shortfalls(
            space_metrics(space) if names is None else names,
            space,
            dims,
            num_samples,
            images,
            generated_kept=min(num_samples, config.pairwise_limit),
            reference_kept=None if images is None else min(images, keep_features, config.pairwise_limit),
            allow_rank_deficient=config.allow_rank_deficient,
        )


def shortfall_text(shortfall: Shortfall, remedies: Sequence[str]) -> str:
    """The problem with its numbers, and what to do about it."""
    what = "samples" if shortfall.side == "generated" else "real images"
    why = f" (one more than the {shortfall.dimensions:,} dimensions of its features)" if shortfall.dimensions else ""
    return (
        f"{shortfall.metric} needs at least {shortfall.need:,} {what}{why}, but there are only {shortfall.have:,}. "
        f"{_alternatives(remedies)}"
    )


def _alternatives(remedies: Sequence[str]) -> str:
    text = ", or ".join([", ".join(remedies[:-1]), remedies[-1]]) if len(remedies) > 1 else remedies[0]
    return f"{text[0].upper()}{text[1:]}."


def check_sizes(
    config: EvaluateConfig,
    dimensions: Mapping[str, int | None],
    num_samples: int,
    images: int | None,
    keep_features: int,
    share: float = 1.0,
) -> None:
    """Raise UserError for metrics with too few samples or images; the remedies are options of a stage.

    `share`: of --num-samples that `num_samples` are, below 1 in the first rungs of a search.
    """
    lines = []
    for shortfall in size_shortfalls(config, dimensions, num_samples, images, keep_features):
        least = f"set --num-samples {math.ceil(shortfall.need / share)}"
        least += "" if share == 1.0 else f" (the first rung of a search has {share:.0%} of them)"
        more = least if shortfall.side == "generated" else "compare with more images"
        allow = ["set --allow-rank-deficient true"] if shortfall.dimensions else []
        lines.append(shortfall_text(shortfall, [more, *allow, "choose other --metrics, such as kid"]))
    if lines:
        raise UserError("\n".join(lines))

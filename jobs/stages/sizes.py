"""Whether there are enough samples and images for the metrics: asked before anything is computed."""

from collections.abc import Iterator, Mapping, Sequence

from edt_core.errors import UserError
from edt_core.evaluation.config import EvaluateConfig
from edt_core.evaluation.metrics import space_metrics
from edt_core.evaluation.metrics.sample_size import UNBIASED_FROM, Shortfall, shortfalls


def wanted_metrics(config: EvaluateConfig, space: str, num_samples: int) -> tuple[str, ...] | None:
    """The metrics to compute in a space; None for all. Beside a Fréchet distance of few samples there is kid."""
    if config.metrics is None:
        return None
    wanted = tuple(name for name in config.metrics if name in space_metrics(space))
    if "fid" in wanted and "kid" not in wanted and num_samples < UNBIASED_FROM:
        wanted = (*wanted, "kid")
    return wanted


def size_shortfalls(
    config: EvaluateConfig,
    dimensions: Mapping[str, int | None],
    num_samples: int,
    images: int | None,
    keep_features: int,
) -> Iterator[Shortfall]:
    """The metrics that these numbers are too small for.

    dimensions: of each feature space, None where not known. images: real ones, None where not known or not a limit.
    """
    for space, dims in dimensions.items():
        wanted = wanted_metrics(config, space, num_samples)
        yield from shortfalls(
            space_metrics(space) if wanted is None else wanted,
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
    why = f" (the {shortfall.dimensions:,} dimensions of its features, and one more)" if shortfall.dimensions else ""
    return (
        f"{shortfall.metric} needs at least {shortfall.need:,} {what}{why}, and there are {shortfall.have:,}. "
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
) -> None:
    """Raise UserError, in the options of a stage, for a metric that a number is too small for."""
    lines = []
    for shortfall in size_shortfalls(config, dimensions, num_samples, images, keep_features):
        more = f"set --num-samples {shortfall.need}" if shortfall.side == "generated" else "compare with more images"
        allow = ["set --allow-rank-deficient true"] if shortfall.dimensions else []
        lines.append(shortfall_text(shortfall, [more, *allow, "name other --metrics, as kid"]))
    if lines:
        raise UserError("\n".join(lines))

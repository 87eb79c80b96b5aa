"""Configuration of an evaluation; the registered metrics are the valid values of `metrics`."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from edt_core.config import Section, runtime
from edt_core.evaluation.metrics.registry import METRICS
from edt_core.evaluation.metrics.sample_size import PAIRWISE

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[METRICS]


class EvaluateConfig(Section):
    """The metrics to compute from stored features.

    The cost of metrics that compare pairs grows with the product of the two sets' sizes; the Fréchet
    distance uses all features.
    """

    metrics: tuple[MetricName, ...] | None = Field(None, description="null for all metrics of the feature space")
    pairwise_limit: int = Field(
        50_000,
        ge=4,
        description=f"{' and '.join(PAIRWISE)}, which compare pairs, use at most this many features of a set, evenly "
        "spaced",
    )
    allow_rank_deficient: bool = Field(
        False, description="compute Fréchet distances even of fewer samples than the features have dimensions"
    )
    num_cpus: float = runtime(1, ge=0, description="CPUs of the computation; 0 reserves none")

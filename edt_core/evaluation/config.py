"""Configuration of an evaluation; the registered metrics are the valid values of `metrics`."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from edt_core.config import SampleConfig, Section, runtime
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


class Rung(Section):
    """One training of a ladder: a model of some width under a number of operations."""

    name: str
    model: str
    width: int
    budget: float
    seed: int


class ScalingConfig(Section):
    """What is fitted to the trainings of a ladder.

    `passes` are the forward passes for one sample, `metric` is the quality that is shown beside the held-out loss.
    """

    rungs: tuple[Rung, ...]
    passes: float
    metric: str
    lower_is_better: bool
    resamples: int = Field(500, ge=1)
    confidence: float = Field(0.9, gt=0, lt=1)


class AlongConfig(SampleConfig):
    """Small evaluations of the checkpoints that a training keeps, by a protocol of their own."""

    every: int | None = Field(None, ge=1, description="training steps between two evaluations; null for none")
    metrics: tuple[MetricName, ...] | None = Field(None, description="null for all metrics of the feature space")
    num_samples: int = Field(1000, ge=2, description="samples per repeat; sample i depends only on (seed, i)")
    num_sampling_steps: int = Field(50, ge=2, description="sampling steps, respaced from the timesteps of training")
    keep_images: int | Literal["all"] = runtime(1, description="not used: no image of these evaluations is kept")

    @property
    def sampling(self) -> SampleConfig:
        """The sampling protocol, which is the same at each point."""
        return SampleConfig(**{name: getattr(self, name) for name in SampleConfig.model_fields} | {"keep_images": 1})

    @property
    def measured(self) -> EvaluateConfig:
        """The metrics, also of fewer samples than a feature space has dimensions: points are compared to each other."""
        return EvaluateConfig(metrics=self.metrics, allow_rank_deficient=True)

"""The scheduler in a pipeline of masked tokens: diffusers has none with the arccos schedule and the Halton order."""

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin


class TokenScheduler(SchedulerMixin, ConfigMixin):
    """Takes the place of a scheduler, which each pipeline of diffusers has: it makes no steps, the own sampler does."""

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000) -> None:
        pass


TokenScheduler.__module__ = "edt_core.pipeline"  # named in model_index.json, independent of where the code is

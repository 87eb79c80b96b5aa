"""Options of a training and of a chain without pydantic, which a bare GPU machine does not have.

They have the attributes and defaults of `TrainConfig` and `ChainConfig` that training steps and samplers read; a test
compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from edt_core.config import ChainConfig, TrainConfig


@dataclass(frozen=True)
class TrainOptions:
    """The fields of `TrainConfig` that its step, its draws, its loader and its estimate read."""

    model: str = "EDT-S/2"
    global_batch_size: int = 256
    max_steps: int = 400_000
    max_hours: float | None = None
    optimizer: str = "adan"
    lr: float = 1e-3
    lr_final: float = 5e-5
    lr_schedule: str = "linear"
    decay_fraction: float = 0.2
    decay_shape: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    ema_decay: float = 0.9999
    ema_widths: tuple[float, ...] = ()
    ema_snapshots: int = 20
    ema_snapshot_dtype: str = "bf16"
    class_dropout_prob: float = 0.1
    mirror_prob: float = 0.5
    masked_loss: bool = True
    timestep_sampler: str = "loss-second-moment"
    time_shift: float = 1.0
    num_timesteps: int = 1000
    min_snr_gamma: float | None = 5.0
    objective: str = "epsilon"
    trainable: str = "all"
    align: str | None = None
    align_block: int | None = None
    align_target_block: int | None = None
    align_features: tuple[int, int] = (16, 768)
    align_distance: str | None = None
    align_weight: float | None = None
    distill: Any = None
    prune: tuple[int, int] | None = None
    mup_base_width: int | None = None
    precision: str = "fp32"
    residual_dtype: str = "fp32"
    seed: int = 0
    num_workers: int = 1
    use_gpu: bool = False
    micro_batch_size: int | None = None
    shard: str = "none"
    compile: bool = False
    activation_checkpointing: bool = False

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        return self.num_workers, self.num_workers

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """All decays."""
        return (self.ema_decay,)

    @property
    def passes(self) -> int:
        """Forward passes per step: the full one, and the masked one if it is enabled."""
        return 2 if self.masked_loss else 1

    def micro_batch(self) -> int:
        """Most samples in a forward pass of a worker."""
        return self.micro_batch_size or -(-self.global_batch_size // self.num_workers)

    def total_steps(self, num_samples: int) -> int:
        """Steps of the whole training."""
        return self.max_steps


@dataclass(frozen=True)
class ChainOptions:
    """The fields of `ChainConfig`."""

    sampler: str = "ancestral"
    num_sampling_steps: int = 250
    temperature: float = 1.0
    time_shift: float = 1.0
    sde_diffusion: str = "sigma"
    cfg_scale: float = 1.0
    cfg_power: float | None = None
    guidance_channels: int | None = 3
    guidance_interval: tuple[float, float] | None = None
    guidance_reference: str | None = None
    amm_blocks: tuple[int, ...] | str = ()
    amm_radius: float | None = None
    amm_radius_rows: int | None = None
    amm_kernel: str | None = None
    precision: str = "fp32"
    cache: Any = None


def training(**fields: Any) -> TrainConfig:
    """Options of a training, for functions that take a `TrainConfig`."""
    return cast("TrainConfig", TrainOptions(**fields))


def chain(**fields: Any) -> ChainConfig:
    """Options of a chain, for functions that take a `ChainConfig`."""
    return cast("ChainConfig", ChainOptions(**fields))

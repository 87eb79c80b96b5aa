"""The seconds and the operations that the chain of an image takes here."""

import json
import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edt_core.config import ChainConfig, SampleConfig, recorded_fields
from edt_core.environment import code_version
from edt_core.errors import UserError
from edt_core.store.artifact import sha256_json
from edt_core.store.folder import Folder

if TYPE_CHECKING:
    from edt_core.models import DiffusionTransformer
    from edt_core.sampling.sampler import Classify

TIMED_SAMPLES = 16  # of a batch that is timed
_RUNS = 2
_TIMES = "seconds.json"  # measured seconds an image by setting, in the output folder


@dataclass
class Clock:
    """Seconds and operations of the chain of an image, here and now; measured once for each setting of a folder."""

    model: "DiffusionTransformer"
    num_timesteps: int
    out: Folder
    guide: "DiffusionTransformer | None" = None
    classify: "Classify | None" = None  # of a chain that is guided away from the confused class

    def __post_init__(self) -> None:
        import torch

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for network in self.networks:
            network.to(self.device)

    @property
    def networks(self) -> "list[DiffusionTransformer]":
        """The model, and its guide if it has one."""
        return [self.model, *([] if self.guide is None else [self.guide])]

    @property
    def place(self) -> str:
        """Where times are measured."""
        import torch

        if self.device.type == "cuda":
            return f"one {torch.cuda.get_device_name(self.device)}"
        return f"{torch.get_num_threads()} threads of this {platform.machine()} machine"

    def seconds(self, config: SampleConfig) -> float:
        """Seconds an image: the fastest of some runs of a batch, without decoding."""
        from edt_core.sampling.sampler import LatentSampler

        fields = {name: value for name, value in recorded_fields(config).items() if name in ChainConfig.model_fields}
        models = [network.built_config.to_dict() for network in self.networks]
        key = sha256_json({"place": self.place, "code": code_version(), "models": models, "chain": fields})
        if (known := self._known().get(key)) is not None:
            return known
        sampler = LatentSampler(self.model, config, self.num_timesteps, self.guide, classify=self.classify)
        count = min(TIMED_SAMPLES, config.unit_size)
        labels, times = [0] * count, []
        for _ in range(_RUNS + 1):  # the first one also allocates
            began = time.perf_counter()
            sampler(labels, 0, list(range(count)))  # waits for the device, to check that the result is finite
            times.append(time.perf_counter() - began)
        seconds = min(times[1:]) / count
        self.out.write_bytes(_TIMES, json.dumps({**self._known(), key: seconds}).encode())
        return seconds

    def _known(self) -> dict[str, float]:
        """The seconds that are in the folder, by setting. Raises UserError for a damaged file."""
        if not self.out.exists(_TIMES):
            return {}
        try:
            known: dict[str, float] = json.loads(self.out.read_bytes(_TIMES))
        except ValueError:
            raise UserError(
                f"{self.out.uri}/{_TIMES} is damaged: it is no JSON. Delete it, and all times are measured again"
            ) from None
        return known

    def flops(self, config: SampleConfig) -> float:
        """Floating-point operations of the chain of an image, two for a multiply-accumulate.

        A cache flushes its features where guidance begins and ends, so its calls are counted in each part of the chain.
        """
        from edt_core.diffusion import objective_of_model

        objective = objective_of_model(self.model.config)
        calls = round(objective.calls(config.sampler, config.num_sampling_steps))
        last = objective.end_of_time(self.num_timesteps)
        first, end = config.guidance_interval or (0, last)
        guided = 0.0 if config.cfg_scale == 1.0 else max(0.0, min(end, last) - first) / last
        inside = round(calls * guided)
        outside = round(calls * first / last) if guided else calls
        parts = [(outside, False), (inside, True), (calls - inside - outside, False)]
        return sum(self._part(config, count, is_guided) for count, is_guided in parts if count > 0)

    def _part(self, config: SampleConfig, calls: int, guided: bool) -> float:
        """The operations of so many calls without a flush between."""
        from edt_core.models import count_macs
        from edt_core.sampling.cache import mean_macs

        passes = [self.model]
        if guided:
            passes.append(self.model if self.guide is None else self.guide)
        macs = [
            count_macs(network) if config.cache is None else mean_macs(network.config, config.cache, calls)
            for network in passes
        ]
        return 2 * calls * sum(macs)

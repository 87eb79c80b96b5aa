"""The seconds and the operations that the chain of an image takes here."""

import json
import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edt_core.config import ChainConfig, SampleConfig, recorded_fields
from edt_core.environment import code_version
from edt_core.store.artifact import sha256_json
from edt_core.store.folder import Folder

if TYPE_CHECKING:
    from edt_core.models import DiffusionTransformer

TIMED_SAMPLES = 16  # of a batch that is timed
_RUNS = 2
_TIMES = "seconds.json"  # measured seconds an image by setting, in the output folder


@dataclass
class Clock:
    """Seconds and operations of the chain of an image, here and now; measured once for each setting of a folder."""

    model: "DiffusionTransformer"
    num_timesteps: int
    out: Folder

    def __post_init__(self) -> None:
        import torch

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self._known: dict[str, float] = json.loads(self.out.read_bytes(_TIMES)) if self.out.exists(_TIMES) else {}

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
        key = sha256_json({"place": self.place, "code": code_version(), "chain": fields})
        if key not in self._known:
            sampler = LatentSampler(self.model, config, self.num_timesteps)
            count = min(TIMED_SAMPLES, config.unit_size)
            labels, times = [0] * count, []
            for _ in range(_RUNS + 1):  # the first one also allocates
                began = time.perf_counter()
                sampler(labels, 0, list(range(count)))  # waits for the device, to check that the result is finite
                times.append(time.perf_counter() - began)
            self._known[key] = min(times[1:]) / count
            self.out.write_bytes(_TIMES, json.dumps(self._known).encode())
        return self._known[key]

    def flops(self, config: SampleConfig) -> float:
        """Floating-point operations of the chain of an image, two for a multiply-accumulate."""
        from edt_core.diffusion import objective_of_model
        from edt_core.models import count_macs
        from edt_core.sampling.cache import mean_macs

        model = self.model.config
        calls = objective_of_model(model).calls(config.sampler, config.num_sampling_steps)
        macs = count_macs(self.model) if config.cache is None else mean_macs(model, config.cache, round(calls))
        return 2 * macs * calls * self._passes(config)

    def _passes(self, config: SampleConfig) -> float:
        """Passes of the model in a call, on average: two where it is guided."""
        from edt_core.diffusion import objective_of_model

        if config.cfg_scale == 1.0:
            return 1.0
        last = objective_of_model(self.model.config).end_of_time(self.num_timesteps)
        first, end = config.guidance_interval or (0, last)
        return 1 + max(0.0, min(end, last) - first) / last

"""Size and time of a forward pass with quantised weights, of random weights.

    python -m tests.benchmarks.quantized [--model EDT-S/2] [--image-size 256] [--batch 8] [--rounds 5]

The models take turns, so that other work on the machine slows all of them; the fastest round counts.
"""

import argparse
import time

import torch

from edt_core.models import DiffusionTransformer, create_model
from edt_core.models.quantized.model import quantizable, quantized_model
from edt_core.models.quantized.record import GROUP_SIZE, Quantization
from edt_core.models.weight_memo import constant_weights

SCHEMES = ("int8-weights", "int8", "int4-weights")


@torch.no_grad()
def seconds(model: DiffusionTransformer, batch: int) -> float:
    """Of the second of two calls in a chain: the first one prepares weights."""
    config = model.config
    x = torch.zeros(batch, config.in_channels, config.latent_size, config.latent_size)
    call = x, torch.full((batch,), 500), torch.zeros(batch, dtype=torch.int64)
    with constant_weights():
        model(*call)
        began = time.perf_counter()
        model(*call)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="EDT-S/2")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = create_model(options.model, options.image_size).eval()
    layers = tuple(quantizable(model))
    models = {"float": model}
    for scheme in SCHEMES:
        group = GROUP_SIZE if scheme == "int4-weights" else None
        models[scheme] = quantized_model(model, Quantization(scheme, layers, group))
    rounds = [{name: seconds(each, options.batch) for name, each in models.items()} for _ in range(options.rounds)]
    usual = min(round_["float"] for round_ in rounds)
    print(f"{options.model}, {options.image_size} px, batch {options.batch}, {torch.get_num_threads()} threads")
    for name, each in models.items():
        fastest = min(round_[name] for round_ in rounds)
        size = sum(value.nbytes for value in each.state_dict().values()) / 2**20
        print(f"{name:<14} {size:8.1f} MiB  {fastest:7.3f} s  {usual / fastest:5.2f} x as fast")


if __name__ == "__main__":
    main()

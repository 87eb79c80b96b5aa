"""Write EDT-Tiny-2-32.pt, a checkpoint in the layout that EDT's authors release, and digits/, images to compare with.

The checkpoint is what `torch.save` of the authors' training script writes: a dict with the trained weights (`model`),
their average (`ema`), the optimizer's state (`opt`) and the options (`args`). The weights are normal draws seeded by
the name of each tensor, so they are the same on every machine, and the model draws patterns without meaning.
"""

import argparse
import zlib
from pathlib import Path

import numpy as np
import torch

from edt_core.data.digits import write_digits
from edt_core.models import create_model

NAME, IMAGE_SIZE, CLASSES, FACTOR = "EDT-Tiny/2", 32, 10, 4  # the autoencoder's factor: latents are 8 x 8
FILE = "EDT-Tiny-2-32.pt"


def formula_weights(seed: int) -> dict[str, torch.Tensor]:
    """The state of the model, float32: each parameter a function of its name and `seed`."""
    model = create_model(NAME, IMAGE_SIZE, CLASSES, autoencoder_factor=FACTOR)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draws = np.random.RandomState(zlib.crc32(f"{name} {seed}".encode())).randn(*parameter.shape)
            fan_in = max(1, parameter[0].numel())
            parameter.copy_(torch.from_numpy(draws / fan_in**0.5))
    return model.state_dict()


if __name__ == "__main__":
    options = argparse.Namespace(model=NAME, image_size=IMAGE_SIZE, num_classes=CLASSES)
    state = {"model": formula_weights(0), "ema": formula_weights(1), "opt": {"state": {}}, "args": options}
    torch.save(state, FILE)
    print(f"{FILE}: {NAME} at {IMAGE_SIZE} px with {CLASSES} classes, {len(state['ema'])} tensors")
    folder = write_digits(Path("digits"))
    print(f"{folder}: {len([*folder.glob('*/*.png')]):,} images")

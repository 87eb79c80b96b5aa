"""Write EDT-Tiny-2-32.pt, a checkpoint in the layout that EDT's authors release, and digits/, images to compare with.

The checkpoint is what `torch.save` of the authors' training script writes: a dict with the trained weights (`model`),
their average (`ema`), the optimizer's state (`opt`) and the options (`args`). The weights are those of a new model from
a fixed seed, so the model draws noise.
"""

import argparse
from pathlib import Path

import torch

from edt_core.data.digits import write_digits
from edt_core.models import create_model

NAME, IMAGE_SIZE, CLASSES, FACTOR = "EDT-Tiny/2", 32, 10, 4  # the autoencoder's factor: latents are 8 x 8
FILE = "EDT-Tiny-2-32.pt"


def new_weights(seed: int) -> dict[str, torch.Tensor]:
    """The state of an untrained model, float32."""
    torch.manual_seed(seed)
    return create_model(NAME, IMAGE_SIZE, CLASSES, autoencoder_factor=FACTOR).state_dict()


if __name__ == "__main__":
    options = argparse.Namespace(model=NAME, image_size=IMAGE_SIZE, num_classes=CLASSES)
    state = {"model": new_weights(0), "ema": new_weights(1), "opt": {"state": {}}, "args": options}
    torch.save(state, FILE)
    print(f"{FILE}: {NAME} at {IMAGE_SIZE} px with {CLASSES} classes, {len(state['ema'])} tensors")
    folder = write_digits(Path("digits"))
    print(f"{folder}: {len([*folder.glob('*/*.png')]):,} images")

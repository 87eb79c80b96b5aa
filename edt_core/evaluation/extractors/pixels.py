"""Shared code of the extractors: check pixels, copy them to the device, compute in float32, copy results back.

Legend: N images, S image side in pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edt_core.errors import UserError
from edt_core.precision import exact_products


def check_pixels(pixels: NDArray[Any] | Tensor) -> None:
    """Raise UserError unless `pixels` are uint8 [N, S, S, 3], RGB levels 0..255, N and S at least 1."""
    shape, dtype = tuple(pixels.shape), str(pixels.dtype).removeprefix("torch.")
    if dtype != "uint8":
        problem = "levels 0..255 are needed; convert floats in -1..1 by truncating 127.5 x + 128"
    elif len(shape) != 4:
        problem = "a batch has four axes; add one of length 1 for a single image"
    elif shape[3] != 3:
        hint = "the channels come last, permute them" if shape[1] == 3 else "convert to RGB"
        problem = f"the last axis is {shape[3]}, not the 3 of RGB; {hint}"
    elif shape[1] != shape[2]:
        problem = f"{shape[1]} x {shape[2]} pixels are not square; crop them as the training images were"
    elif 0 in shape:
        problem = "the batch is empty; leave empty batches out"
    else:
        return
    raise UserError(f"the images are {dtype} {list(shape)}, but a feature network needs uint8 [N, S, S, 3]: {problem}")


def images_on(device: torch.device, pixels: NDArray[np.uint8] | Tensor) -> Tensor:
    """A view uint8 [N, 3, S, S] on the device of pixels uint8 [N, S, S, 3]. Raises as `check_pixels`."""
    check_pixels(pixels)
    if not isinstance(pixels, Tensor):  # torch rejects negative strides and warns of read-only memory
        pixels = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
    if device.type == "cuda" and pixels.device.type == "cpu":
        pixels = pixels.pin_memory()
    return pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)


def standardised(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Levels 0..255 [N, 3, S, S], scaled to 0..1 and standardised by the channels' mean and std; float32."""
    centre, width = (torch.tensor(values, device=levels.device).view(1, 3, 1, 1) for values in (mean, std))
    return (levels / 255 - centre) / width


def on_host(outputs: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """The tensors as float32 arrays. All copies from an accelerator are started before one is waited for."""
    copies: dict[str, Tensor] = {}
    for name, tensor in outputs.items():
        values = tensor.detach().float().contiguous()
        if values.is_cuda:
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        copies[name] = values
    if any(tensor.is_cuda for tensor in outputs.values()):
        torch.cuda.current_stream(next(iter(outputs.values())).device).synchronize()
        # Copied out of pinned memory, which cannot be swapped: the caller may store thousands of batches.
        return {name: values.numpy().copy() for name, values in copies.items()}
    return {name: values.numpy() for name, values in copies.items()}


@contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """Context of inference in full float32, without autocast, TF32 or bfloat16 products; restores them afterwards."""
    with exact_products(), torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield

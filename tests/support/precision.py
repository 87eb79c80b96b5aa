"""What precision a process was set to when its networks computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def precisions_of_layers() -> Iterator[set[str]]:
    """A set that gathers the settings of a GPU's products and convolutions whenever a layer is called."""
    found: set[str] = set()
    cudnn: Any = torch.backends.cudnn

    def note(layer: nn.Module, _inputs: object) -> None:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            found.update((torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision))  # type: ignore[attr-defined]

    handle = register_module_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()

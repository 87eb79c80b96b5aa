"""What several tests of the training loop look at: a narrow EDT, checkpoints on the disk, and a training cut short."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edt_core.models import ModelConfig, model_config
from edt_core.store.layout import CHECKPOINT_MANIFEST
from edt_core.store.manifest import sha256_json
from edt_core.training.checkpoint import checkpoint_name
from edt_core.training.context import LocalContext
from edt_core.training.ranks import Ranks
from edt_core.training.speed.update import CompiledUpdate


class OneOfOne(Ranks):
    """The one rank of a process group, whose model exchanges its gradients as if there were others."""

    def wrap(self, model: nn.Module, *options: Any) -> nn.Module:
        return Ranks(0, 2).wrap(model, *options)


def plain_update(*inputs: Any, **options: Any) -> CompiledUpdate:
    """The update whose functions are not compiled, which takes longer than a training: test_training_update.py does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: function)
        return CompiledUpdate(*inputs, **options)


def narrow() -> ModelConfig:
    """All that an EDT has, as narrow as can be: many checkpoints of it are soon written."""
    return replace(model_config("EDT-Tiny/2", 32, 4), dims=(16, 20, 24, 20, 16), depths=(1, 1, 1, 1, 1))


def place(folder: Path, step: int) -> Path:
    """A checkpoint in a training's folder."""
    return folder / "checkpoints" / checkpoint_name(step)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def cut_back(folder: Path, copy: Path, step: int) -> LocalContext:
    """A context in a copy of a training's folder whose newest checkpoint is that of `step`."""
    shutil.copytree(folder, copy)
    context = LocalContext(copy)
    for newer in context.store.steps():
        if newer > step:
            context.store.remove(newer)
    return context


def with_version(checkpoint: Path, version: int) -> Path:
    """A checkpoint's folder, whose manifest now states another version of the format."""
    path = checkpoint / CHECKPOINT_MANIFEST
    fields = {**json.loads(path.read_text()), "version": version}
    fields.pop("seal")
    path.write_text(json.dumps({**fields, "seal": sha256_json(fields)}))
    return checkpoint


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

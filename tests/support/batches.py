"""Batches of latents that a loader gives, looked at together."""

from collections.abc import Iterator
from itertools import islice

import torch

from edt_core.data.loader import LatentBatch


def assert_held_batches_stay(batches: Iterator[LatentBatch]) -> None:
    """A view of every fourth of 40 batches is held: none changes, although buffers of the others are used again."""
    views, copies, places = [], [], set()
    for batch in islice(batches, 40):
        if batch.step % 4 == 0:
            views.append(batch.posterior[:, 0])
            copies.append(views[-1].clone())
        places.add(batch.posterior.data_ptr())
        del batch
    assert all(torch.equal(view, copy) for view, copy in zip(views, copies, strict=True))
    assert len(places) < 20

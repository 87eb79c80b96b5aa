"""The index of the originals of an artifact finds what a search one by one finds, whatever repeats."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edt_core.data.tables import arrow_file, sorting
from jobs.stages.reuse import lookup
from jobs.stages.reuse.originals import Report


@pytest.mark.parametrize("rows", [2, 3, 8, 1000])
@pytest.mark.parametrize("by_version", [False, True])
def test_the_first_of_each_key_is_found_once(rows: int, by_version: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(rows)
    for module in (arrow_file, sorting, lookup):
        monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(sorting, "_SAMPLE", 2)
    pool = rng.integers(0, 256, (40, 32), dtype=np.uint8)
    pool[20:30, :8] = pool[0, :8]  # keys that begin alike are told apart
    which, sizes = rng.integers(0, 30, 90), [25, 1, 40, 24]

    def reports(artifact: Any) -> Iterator[Report]:
        first = 0
        for shard, size in enumerate(sizes):
            keys = pool[which[first : first + size]]
            digests, versions = (keys[:, ::-1].copy(), keys) if by_version else (keys, np.zeros_like(keys))
            numbers = np.arange(size, dtype=np.int32)
            numbers[0] = -1
            yield Report(shard, first, digests, versions, numbers, {first: f"broken {first}"})
            first += size

    monkeypatch.setattr(lookup, "reports_of", reports)
    index = lookup.Lookup(None, by_version)  # type: ignore[arg-type]
    assert set(index.reasons) == {0, 25, 26, 66}
    asked = rng.integers(0, 40, 60)
    wanted = rng.random(60) < 0.8
    found: dict[int, tuple[int, int, int, bytes]] = {}
    for part in index.find(pool[asked], wanted):
        for k, place in enumerate(part.places.tolist()):
            assert place not in found
            found[place] = int(part.position[k]), int(part.shard[k]), int(part.row[k]), part.digests[k].tobytes()
    starts = np.cumsum([0, *sizes])
    for place, key in enumerate(asked.tolist()):
        at = np.flatnonzero(which == key)
        if not wanted[place] or not len(at):
            assert place not in found
            continue
        position = int(at[0])
        shard = int(np.searchsorted(starts, position, "right")) - 1
        row = position - int(starts[shard])
        digest = pool[key][::-1] if by_version else pool[key]
        assert found[place] == (position, shard, row or -1, digest.tobytes())

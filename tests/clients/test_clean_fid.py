"""clean-fid on an exported folder of PNGs: it finds every image and reads the pixels that were drawn."""

from pathlib import Path

import numpy as np
import pytest

from edt_core.data.export import export_samples
from tests.clients.conftest import Images


@pytest.mark.extern
def test_clean_fid_finds_every_png_and_reads_its_pixels(images: Images, tmp_path: Path) -> None:
    """As its `get_folder_features` finds files: by extension, in every folder below, sorted by name."""
    utils = pytest.importorskip("cleanfid.utils", reason="clean-fid or its torchvision is not installed")
    count = len(images.labels)
    export_samples("png", [(np.arange(count), images.labels, images.pixels)], count, tmp_path / "pngs")

    found = {path for ending in utils.EXTENSIONS for path in (tmp_path / "pngs").rglob(f"*.{ending}")}
    assert found == set((tmp_path / "pngs").iterdir())

    data = utils.ResizeDataset([str(path) for path in sorted(found)], mode="legacy_tensorflow")  # it resizes later
    read = np.stack([np.asarray(data[index]) for index in range(count)])
    assert np.array_equal(read.transpose(0, 2, 3, 1), images.pixels)

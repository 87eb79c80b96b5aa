"""The quickstart's real images: 1,797 scans of handwritten digits that ship inside scikit-learn.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (CC BY 4.0).
"""

import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np

from edt_core.data.images import write_image_folder

NUM_DIGITS = 1797


def write_digits(root: Path) -> Path:
    """Write the digits (8x8, 17 grey levels) as an image folder, one folder a class, unless they are there.

    Returns `root`. The folder appears whole: a writer that dies leaves nothing at `root`.
    """
    if _complete(root):
        return root
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    staging = root.with_name(f".staging-{uuid.uuid4().hex}")
    try:
        write_image_folder(staging, pixels, [str(label) for label in digits.target])
        if root.exists() and not _complete(root):
            shutil.rmtree(root)
        with suppress(OSError):  # another run was first: its folder is the same
            os.replace(staging, root)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return root


def _complete(root: Path) -> bool:
    return sum(1 for _ in root.glob("*/*.png")) == NUM_DIGITS

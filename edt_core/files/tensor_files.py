"""Safetensors files: opened only if the header is complete and of bounded size; errors are UserErrors.

Format: github.com/huggingface/safetensors, "Format": 8 bytes with the length of the header, the header as JSON, values.
The library checks dtypes, shapes and offsets, and that offsets neither overlap nor exceed the file. It reads headers of
up to 100 MB, whose JSON would take gigabytes of memory.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edt_core.errors import UserError
from edt_core.files.small_files import check_regular

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 16 << 20  # some 100,000 tensors
_LENGTH = 8  # bytes of the header's length
_NO_LIMIT = 1 << 62


def check_header(path: Path) -> None:
    """Raise UserError for a file that is not regular, or whose header is truncated or too large."""
    check_regular(path, path.stat(), _NO_LIMIT)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        size = os.fstat(file.fileno()).st_size
    if size < _LENGTH or length > size - _LENGTH:
        raise _damaged(path, f"its header would have {length:,} bytes, but the file has {size:,}")
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, f"its header has {length:,} bytes, more than the limit of {MAX_HEADER_BYTES:,}")


def check_folder_headers(folder: Path) -> None:
    """Check every safetensors file directly in a folder, and open each, before a library reads them."""
    for path in sorted(folder.glob("*.safetensors")):
        with opened_tensors(path):
            pass


@contextmanager
def opened_tensors(path: Path, framework: Literal["pt", "numpy"] = "pt") -> Iterator[Any]:
    """`safetensors.safe_open` of a file. Raises UserError if it is damaged, also within the block."""
    from safetensors import SafetensorError, safe_open

    check_header(path)
    try:
        with safe_open(path, framework) as file:
            yield file
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def load_tensors(path: Path, framework: Literal["pt", "numpy"] = "pt") -> dict[str, Any]:
    """All tensors of a file by name. Raises UserError if it is damaged."""
    with opened_tensors(path, framework) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is not a dict


def load_state(model: Any, path: Path) -> None:
    """Load a file's tensors into a model. Raises UserError unless they are exactly those of the model."""
    tensors: dict[str, Tensor] = load_tensors(path)
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = (lines[1:] or lines or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{path} does not contain the weights of its model ({reason[:300]}); use a folder whose files were written "
            "together, or create it again"
        ) from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is not a valid safetensors file: {reason[:300]}; copy or download it again, or create it again"
    )

"""Tokens of a feature network beside latents: the targets of `train.align: features`.

Format: one `.npy` file for each latent shard, float16 [N, 2, T, K], rows as in the shard: side (image, mirror image),
tokens of a square of patches row by row, features.

Legend: N rows of a shard, n requested rows, T tokens, K features.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edt_core.errors import UserError

Pixels = NDArray[np.uint8]  # [n, S, S, 3]
Tokens = NDArray[np.float16]  # [n, T, K]
Network = Callable[[Pixels], NDArray[np.float32]]  # tokens [n, T, K]


def write_tokens(path: Path, batches: Iterable[Pixels], rows: int, network: Network) -> int:
    """Write the tokens of `rows` images and of their mirror images; return the number of rows written.

    Raises UserError for tokens that are not finite in float16, and for more images than `rows`.
    """
    done, out = 0, None
    for pixels in batches:
        sides = (network(view) for view in (pixels, np.ascontiguousarray(pixels[:, :, ::-1])))
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
            tokens = np.stack([side.astype(np.float16) for side in sides], axis=1)
        if not np.isfinite(tokens).all():
            raise UserError("the tokens of the feature network are not finite in float16; its weights are damaged")
        if out is None:
            out = np.lib.format.open_memmap(path, "w+", np.float16, (rows, *tokens.shape[1:]))
        if done + len(tokens) > rows:
            raise UserError(f"there are more images than the {rows} of the manifest; run preprocess again")
        out[done : done + len(tokens)] = tokens
        done += len(tokens)
    if out is None or done < rows:
        raise UserError(f"there are {done} images, and the manifest has {rows}; run preprocess again")
    out.flush()
    return done


class TokenTable:
    """The tokens of all latent shards as one table, memory-mapped, in order of shard and row.

    Raises UserError for a file of another layout.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._parts = [_mapped(path) for path in paths]
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def gather(self, rows: NDArray[np.int64], mirror: NDArray[np.bool_]) -> Tokens:
        """Tokens float16 [n, T, K] of rows int64 [n] of the shards; of mirror images where `mirror` is true."""
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        places = zip(parts.tolist(), (rows - self._starts[parts]).tolist(), mirror.astype(int).tolist(), strict=True)
        return np.stack([self._parts[part][row, side] for part, row, side in places])


def _mapped(path: Path) -> NDArray[np.float16]:
    try:
        part: NDArray[np.float16] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a file of tokens ({error}); encode the images again") from error
    if part.dtype != np.float16 or part.ndim != 4 or part.shape[1] != 2:
        raise UserError(
            f"{path} has {part.dtype} {list(part.shape)}, and tokens are float16 [N, 2, T, K]; encode the images again"
        )
    return part

"""Checks of features before a metric is computed."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edt_core.errors import UserError


def checked_features(features: ArrayLike, name: str, min_samples: int = 2) -> NDArray[np.floating]:
    """Features [N, D] as an array in their own floating dtype; integers become float64.

    `name` names the features in messages.
    Raises UserError for another number of dimensions, for fewer than `min_samples` rows, and for values that
    are not finite.
    """
    array = np.asarray(features)
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float64)
    if array.ndim != 2 or array.shape[1] == 0:
        raise UserError(
            f"the {name} features have shape {array.shape}, but a metric needs [samples, dimensions]. "
            "Flatten each sample's features to one row."
        )
    if len(array) < min_samples:
        raise UserError(
            f"there are {len(array)} {name} features, but this metric needs at least {min_samples}. "
            "Increase the number of samples."
        )
    bad_rows = int(np.sum(~np.isfinite(array).all(axis=1)))
    if bad_rows:
        raise UserError(
            f"{bad_rows} of {len(array)} {name} features contain NaN or infinity. "
            "Check for non-finite samples, and for a feature network with too low a precision."
        )
    return array


def check_same_dimensions(generated: int, reference: int) -> None:
    """Raise UserError if two feature sets cannot be from the same feature network."""
    if generated != reference:
        raise UserError(
            f"the generated features have {generated} dimensions, but the reference features have {reference}. "
            "Extract both with the same feature network and layer."
        )


def checked_pair(
    generated: ArrayLike, reference: ArrayLike, min_samples: int = 2
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Both feature sets as arrays. Raises UserError for invalid features or different numbers of dimensions."""
    first = checked_features(generated, "generated", min_samples)
    second = checked_features(reference, "reference", min_samples)
    check_same_dimensions(first.shape[1], second.shape[1])
    return first, second

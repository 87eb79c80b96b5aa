"""The statistics of real images in a committed reference, and the distance between two references."""

from edt_core.evaluation.metrics import FeatureSet, Gaussian, frechet_distance
from edt_core.files.tensor_files import opened_tensors
from edt_core.store.artifact import Artifact
from edt_core.store.layout import REFERENCE_NAME


def load_reference(reference: Artifact, space: str) -> FeatureSet:
    """The reference side of a comparison in one feature space. Raises UserError for a damaged artifact."""
    reference.verify_once(REFERENCE_NAME)
    with opened_tensors(reference.path(REFERENCE_NAME), "numpy") as file:
        names = set(file.keys())

        def gaussian(key: str) -> Gaussian | None:
            if f"{key}.mean" not in names:
                return None
            count = int(file.get_tensor(f"{key}.count")[0])
            return Gaussian(file.get_tensor(f"{key}.mean"), file.get_tensor(f"{key}.covariance"), count or None)

        features = file.get_tensor(f"{space}.features") if f"{space}.features" in names else None
        return FeatureSet(
            features=features, statistics=gaussian(space), spatial_statistics=gaussian(f"{space}.spatial")
        )


def drift(before: Artifact, now: Artifact) -> dict[str, float]:
    """Fréchet distance of two references in each feature space that both have from the same network.

    Raises UserError for a damaged artifact, ValueError for one without a Gaussian.
    """
    first, second = before.counts["extractors"], now.counts["extractors"]
    sides = (("champion's reference", before), ("new reference", now))
    return {
        space: frechet_distance(*(load_reference(item, space).gaussian(name) for name, item in sides))
        for space, digest in second.items()
        if first.get(space) == digest
    }

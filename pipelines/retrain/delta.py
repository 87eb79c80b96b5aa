"""What changed in the images since the champion was trained."""

from typing import Any

import numpy as np

from edt_core.data.sources import list_source
from edt_core.data.sources.delta import ImageDelta, LabelledDigests, image_delta
from edt_core.errors import UserError
from edt_core.store.artifact import Source
from edt_core.store.store import Store
from jobs.stages.reuse.labelled import labelled_digests
from jobs.stages.reuse.originals import Originals
from jobs.stages.reuse.siblings import NONE, first_of


def delta_of(version: Any | None, store: Store, source: Source) -> ImageDelta | None:
    """The change since a version was trained, from its image artifact to the source.

    An image that the version could not read and that is still there is not counted. None if the artifact is gone, or
    the digests of the source are not known, as of a remote one.
    """
    if version is None or source.selection is None or source.digests is None:
        return None
    images = store.find("images", version.tags.get("edt.images", ""))
    listing = list_source(source.selection)
    if images is None or len(listing) != len(source.digests):  # files come or go at this moment
        return None
    try:
        originals = Originals.of(images)
        before = labelled_digests(images, originals)
    except (UserError, OSError):
        return None
    known = first_of(source.digests, originals.digests[originals.row == NONE]) == NONE  # not among the unreadable
    labels = np.asarray(listing.table["label"])
    return image_delta(before, LabelledDigests(source.digests[known], labels[known], listing.classes))

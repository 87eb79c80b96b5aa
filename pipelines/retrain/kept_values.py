"""The configuration of the run that made a version, as raw values, with the networks of that version kept."""

import re
from collections.abc import Mapping
from typing import Any

from edt_core.evaluation.extractors import PUBLISHED_SPACES
from edt_core.store.folder import Folder
from edt_core.store.store import Store
from pipelines.registry.kept import autoencoder_of
from pipelines.tracking.runs import Record

_DIGEST = re.compile("[0-9a-f]{64}")


def kept_values(record: Record, version: Any, store: str) -> dict[str, Any]:
    """The recorded values for a store, with the autoencoder and the classifier of the version, and pinned networks."""
    place = f"models:/{version.name}/{version.version}"
    values: dict[str, Any] = {**record.config, "store": store}
    autoencoder = dict(values.get("autoencoder") or {})
    if is_of_a_version(autoencoder) or autoencoder_of(version, Store(Folder.at(store))) is not None:
        autoencoder["pretrained"] = place
    classifier = place if "classifier" in values.get("extractors", ()) else None
    own = {**(values.get("classifier") or {}), "pretrained": classifier}
    return {**values, "autoencoder": autoencoder, "classifier": own, **pinned_networks(record)}


def pinned_networks(record: Record) -> dict[str, Any]:
    """The sections of published feature networks with the digests of the weights that the run had."""
    sections = {space: record.config.get(space) for space in PUBLISHED_SPACES}
    digests = {space: record.tags.get(f"edt.{space}", "") for space in PUBLISHED_SPACES}
    return {
        space: {**network, "sha256": network.get("sha256") or digests[space]}
        for space, network in sections.items()
        if network and _DIGEST.fullmatch(digests[space])
    }


def is_of_a_version(autoencoder: Mapping[str, Any]) -> bool:
    """Whether a section's autoencoder is fitted, or of a registered version; a published one is neither."""
    published = autoencoder.get("pretrained")
    return published is None or str(published).startswith("models:/")

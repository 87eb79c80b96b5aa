"""Networks of registered versions that a run keeps: the artifacts of their autoencoder and classifier in the store.

A kept network is not fitted again. Its artifact is the input of the later steps, so what was made with it is reused.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edt_core.errors import UserError
from edt_core.store.artifact import Artifact, Source, canonical_json
from edt_core.store.layout import CLASSES_NAME
from edt_core.store.store import Store
from jobs.models.registry_files import title
from pipelines.config.schema import PipelineConfig
from pipelines.registry.lookup import find
from pipelines.tracking.catalog import Catalog

_LOCATION = re.compile(r"models:/[\w.-]+(?:@[\w.-]+|/\d+)")
_TAG = "edt.kept."  # of a workflow run: the artifact of a role that it kept


class ClassesDifferError(UserError):
    """A kept classifier knows other classes than the images have. `change` names them."""

    def __init__(self, message: str, change: str) -> None:
        super().__init__(message)
        self.change = change


@dataclass(frozen=True)
class Kept:
    """The artifact of a registered version's network. `item` is a stand-in with a fingerprint in an outline."""

    item: Artifact | Source
    version: str  # "edt-s version 3"


def kept_networks(
    config: PipelineConfig, tracking_uri: str | None, store: Store, classes: tuple[str, ...] = ()
) -> dict[str, Kept]:
    """Role -> network that a run of the configuration keeps; `classes` are the names of its classes, if known.

    An autoencoder whose artifact is not in the store is left out: a run takes it from the registered folder. Raises
    UserError for a classifier that is not there, and for a network that does not fit the configuration.
    """
    catalog = None if tracking_uri is None else Catalog(tracking_uri, "")
    networks: dict[str, Kept] = {}
    location = config.autoencoder.pretrained
    if catalog is not None and location is not None and _LOCATION.fullmatch(location):
        with suppress(UserError):  # the registered folder is looked up as well, and reports what is missing
            version = find(catalog, location)
            if (artifact := autoencoder_of(version, store)) is not None:
                networks["autoencoder"] = Kept(artifact, title(version))
        if "autoencoder" in networks:
            _check_autoencoder(config, networks["autoencoder"])
    location = config.classifier.pretrained if "classifier" in config.extractors else None
    if location is not None:
        if catalog is None:
            raise UserError(f"classifier.pretrained is {location}, and {store.root.uri} has no MLflow record yet")
        version = find(catalog, location)
        networks["classifier"] = Kept(classifier_of(version, store), title(version))
        _check_classifier(config, networks["classifier"], store, classes)
    return networks


def autoencoder_of(version: Any, store: Store) -> Artifact | None:
    """The autoencoder that a version was trained with, if its artifact is in the store, and its weights as then."""
    identity = version.tags.get("edt.autoencoder")
    artifact = None if identity is None else store.find("autoencoder", identity)
    checkpoint = _manifest(store, "checkpoint", version.tags.get("edt.checkpoint"))
    if artifact is None or checkpoint is None:
        return artifact
    # One that was lost and fitted again has its old fingerprint, but can have other weights.
    return artifact if checkpoint.counts.get("autoencoder_digest") in (None, artifact.manifest.digest) else None


def classifier_of(version: Any, store: Store) -> Artifact:
    """The classifier that a version was evaluated with. Raises UserError if it is not in the store any more."""
    evaluation = _manifest(store, "evaluation", version.tags.get("edt.evaluation"))
    features = _manifest(store, "features", None if evaluation is None else evaluation.manifest.inputs.get("features"))
    if features is None:
        raise _no_classifier(version, f"its evaluation or its samples are not in the store {store.root.uri}")
    identity = features.manifest.inputs.get("classifier")
    if identity is None:
        raise _no_classifier(version, "it was evaluated without a classifier")
    artifact = store.find("classifier", identity)
    if artifact is None:
        raise _no_classifier(version, f"classifier/{identity[:12]} is not in the store {store.root.uri}")
    if features.counts.get("extractors", {}).get("classifier") not in (None, artifact.manifest.digest):
        raise _no_classifier(version, f"classifier/{identity[:12]} was fitted again since, and has other weights")
    return artifact


def reference_of(version: Any, store: Store) -> Artifact | None:
    """The reference that a version was evaluated against, if it is in the store and made of images."""
    evaluation = _manifest(store, "evaluation", version.tags.get("edt.evaluation"))
    identity = "" if evaluation is None else evaluation.manifest.inputs.get("reference", "")
    reference = store.find("reference", identity)
    return reference if reference is not None and reference.counts.get("source") == "images" else None


def kept_tags(kept: Mapping[str, Kept]) -> dict[str, str]:
    """The tags of a workflow run that say which artifacts it kept."""
    tags = {}
    for role, network in kept.items():
        assert isinstance(network.item, Artifact), role
        artifact = network.item
        identity = {"fingerprint": artifact.fingerprint, "digest": artifact.manifest.digest}
        tags[f"{_TAG}{role}"] = canonical_json({"version": network.version, "uri": artifact.folder.uri, **identity})
    return tags


def kept_roles(tags: Mapping[str, str]) -> set[str]:
    """The roles of the networks that a workflow run kept, from its tags."""
    return {key.removeprefix(_TAG) for key in tags if key.startswith(_TAG)}


def recorded_networks(tags: Mapping[str, str]) -> dict[str, Kept]:
    """Role -> network that a workflow run kept. Raises UserError if its artifact is not there as it was."""
    networks = {}
    for role in sorted(kept_roles(tags)):
        record = json.loads(tags[f"{_TAG}{role}"])
        try:
            artifact = Artifact.open(record["uri"])
        except (UserError, OSError) as error:
            raise UserError(
                f"the run kept the {role} of {record['version']}, and its artifact is not usable: {error}"
            ) from error
        if (artifact.fingerprint, artifact.manifest.digest) != (record["fingerprint"], record["digest"]):
            raise UserError(
                f"the run kept the {role} of {record['version']}, and {record['uri']} now holds other content. Restore "
                "that folder from a backup"
            )
        networks[role] = Kept(artifact, record["version"])
    return networks


def _check_autoencoder(config: PipelineConfig, kept: Kept) -> None:
    """Raise UserError if the configuration states another factor or number of channels than the autoencoder has."""
    assert isinstance(kept.item, Artifact)
    stated = {name: getattr(config.autoencoder, name) for name in ("downsample_factor", "latent_channels")}
    if differing := {n: kept.item.counts[n] for n, value in stated.items() if kept.item.counts.get(n, value) != value}:
        raise UserError(
            f"the autoencoder of {kept.version} has {differing}, and the configuration says {stated}. Set these fields "
            "of `autoencoder` to what it has"
        )


def _check_classifier(config: PipelineConfig, kept: Kept, store: Store, classes: tuple[str, ...]) -> None:
    """Raise UserError for another size of features than the configuration states, or other classes than the images'."""
    artifact = kept.item
    assert isinstance(artifact, Artifact)
    way_on = "Fit one on these images: classifier.pretrained=null"
    dimensions = artifact.counts.get("feature_dim", config.classifier.feature_dim)
    if dimensions != config.classifier.feature_dim:
        raise UserError(
            f"the classifier of {kept.version} has {dimensions} dimensions, and classifier.feature_dim is "
            f"{config.classifier.feature_dim}. Set it to {dimensions}"
        )
    known = _classes_of(artifact, store)
    if classes and known and tuple(known) != classes:
        gained, lost = sorted(set(classes) - set(known)), sorted(set(known) - set(classes))
        changes = [f"{word} {', '.join(names[:5])}" for word, names in (("new:", gained), ("gone:", lost)) if names]
        detail = "; ".join(changes) or "in another order"
        text = f"the classifier of {kept.version} knows other classes than the images have ({detail})"
        raise ClassesDifferError(f"{text}. {way_on}", f"the classes changed ({detail})")
    number = artifact.counts.get("classes", len(classes))
    if classes and number != len(classes):
        text = f"the classifier of {kept.version} knows {number} classes, and the images have {len(classes)}"
        raise ClassesDifferError(f"{text}. {way_on}", f"there are {len(classes)} classes, and it knows {number}")


def _classes_of(classifier: Artifact, store: Store) -> list[str]:
    """The class names of the images that a classifier was fitted on; none if these are gone."""
    images = _manifest(store, "images", classifier.manifest.inputs.get("images"))
    if images is None:
        return []
    with suppress(UserError, OSError):
        return [str(name) for name in images.read_json(CLASSES_NAME)]
    return []


def _manifest(store: Store, kind: str, identity: str | None) -> Artifact | None:
    """A committed artifact by its manifest alone; None if there is none."""
    with suppress(UserError, OSError):
        return None if identity is None else Artifact.read(store.folder(kind, identity))
    return None


def _no_classifier(version: Any, why: str) -> UserError:
    return UserError(
        f"the classifier of {title(version)} cannot be kept: {why}. Fit one with classifier.pretrained=null, or "
        f"retrain with `edt retrain {version.name} --from-scratch`"
    )

"""Open the inputs of a stage from the command line, by role, from a folder, a URI, the hub or MLflow."""

import argparse
from typing import Any

from edt_core.config import SourceConfig
from edt_core.errors import UserError
from edt_core.evaluation.extractors import EXTRACTORS, PUBLISHED_SPACES, extractor_spec
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from jobs.commands.options import given_fields, validated
from jobs.models.open import is_artifact
from jobs.stages.autoencoder import published_artifact
from jobs.stages.extractors import extractor_source
from jobs.stages.preprocess import image_source
from jobs.stages.reference import statistics_source
from jobs.stages.stage import Input, Stage

ROLE_HELP = {
    "source": "labelled images: a folder, file or URI (s3://...)",
    "autoencoder": "autoencoder artifact, local diffusers folder, hub id, or MLflow URI (models:/NAME@ALIAS)",
    "images": "images artifact: a folder or URI",
    "statistics": "ADM's .npz of reference statistics, such as VIRTUAL_imagenet256_labeled.npz",
    "guide": "a weaker model to guide away from (autoguidance): a checkpoint artifact",
}


_REFERENCE_IMAGES = f"{ROLE_HELP['images']}; or ADM's .npz of reference statistics"


def role_help(stage: Stage, role: str) -> str:
    """The help of an input of a stage."""
    if (stage.name, role) == ("reference", "images"):
        return _REFERENCE_IMAGES
    return ROLE_HELP.get(role, f"{role} artifact: a folder or URI")


def add_role(parser: Any, role: str) -> None:
    """Add the option of an optional input."""
    if role in EXTRACTORS:
        spec = extractor_spec(role)
        parser.add_argument(spec.option, dest=role, metavar="INPUT", help=spec.help)
    else:
        parser.add_argument(f"--{role}", dest=role, metavar="INPUT", help=ROLE_HELP[role])


def open_input(role: str, location: str, out: Folder, options: argparse.Namespace, progress: Progress) -> Input:
    """Open an input by its role: images, an autoencoder of any form, or a committed artifact. Raises UserError."""
    if role == "source":
        fields = given_fields(options, SourceConfig) | {"path": location}
        return image_source(validated(SourceConfig, fields), progress)
    if role == "autoencoder" and not is_artifact(location):
        return published_artifact(location, out.child(".autoencoder"))
    if role in PUBLISHED_SPACES:
        return extractor_source(role, *split_digest(location))
    if role == "statistics" or (role == "images" and location.endswith(".npz")):
        return statistics_source(location)
    artifact = Artifact.open(location)
    kind = "checkpoint" if role == "guide" else role  # other roles are named after their kind of artifact
    if artifact.manifest.kind not in (kind, role):
        raise UserError(f"{location} is an artifact of kind {artifact.manifest.kind}, but {kind} is needed here")
    return artifact


def split_digest(location: str) -> tuple[str, str | None]:
    """Split `LOCATION#sha256=HEX` into its two parts; the digest is None if it is not stated."""
    place, separator, digest = location.rpartition("#sha256=")
    return (place, digest) if separator and "/" not in digest else (location, None)  # with a slash it is part of a path

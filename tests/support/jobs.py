"""A verb run as a step of a workflow runs it."""

from pathlib import Path

from edt_core.artifact import Artifact, ArtifactWriter
from edt_core.config import Section
from edt_core.progress import Silent
from edt_core.storage import Folder
from jobs.verb import Input, Verb


def execute(verb: Verb, config: Section, folder: Path, **inputs: Input) -> Artifact:
    identity = verb.fingerprint(config, {role: item.fingerprint for role, item in inputs.items()})
    return verb.execute(config, inputs, ArtifactWriter(Folder.at(folder), verb.kind, identity), Silent())

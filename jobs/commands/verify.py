"""verify: check an artifact against its manifest, in place. Needs neither Ray nor a cluster."""

from edt_core.errors import UserError
from edt_core.files.place_names import typed_path
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact
from edt_core.store.digests import listing
from edt_core.store.folder import Folder
from edt_core.store.layout import MANIFEST_NAME
from edt_core.store.prefixes import PREFIX, artifact_folder


def verify(location: str, deep: bool = False, progress: Progress | None = None, store: str | None = None) -> str:
    """Compare an artifact's files with its manifest and return a summary in one line.

    `location`: a folder, a URI, or a fingerprint in `store`, of which the beginning is enough.
    Names and sizes are compared, with `deep` also the sha256 of every file, read from the disk or store itself.
    Raises UserError with the first ten problems and their number; ManifestError if there is no complete manifest.
    """
    artifact = Artifact.read(_place(location, store))
    manifest = artifact.manifest
    if problems := artifact.problems(deep, progress):
        lines = listing(problems, "\n  ")
        number = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(
            f"{artifact.folder.uri} is damaged, {number} in {len(manifest.files)} files:\n  "
            f"{lines}\n"
            f"remove its {MANIFEST_NAME} and run its step again, or remove files that are not in the manifest"
        )
    size = sum(entry.bytes for entry in manifest.files)
    checked = "sha256 of every file" if deep else "size of every file"
    content = f"{len(manifest.files)} files, {size:,} bytes, {checked} as stated"
    return f"{location}: {manifest.kind} {manifest.fingerprint[:12]}, {content}, content digest {manifest.digest[:12]}"


def _place(location: str, store: str | None) -> str:
    """The folder that a text names: itself, or that of an artifact of the store by its fingerprint."""
    if store is None or Folder.at(location).exists(MANIFEST_NAME):
        return location
    if (found := artifact_folder(Folder.at(store), location)) is not None:
        return found.uri
    if PREFIX.fullmatch(location) and not typed_path(location).exists():
        raise UserError(
            f"no finished artifact in {store} has a fingerprint that begins with {location}; `edt artifacts` lists "
            "them. Set --store, or give the folder of the artifact"
        )
    return location

"""Weights of published networks: located by the user, verified by digest, loaded without running their code.

Missing weights are never replaced by others: the error says where to get them.
"""

import hashlib
import re
import urllib.request
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import URLError
from urllib.parse import urlsplit

import torch
from torch import Tensor

from edt_core.errors import UserError
from edt_core.evaluation.extractors import ExtractorSpec, extractor_spec
from edt_core.files.place_names import typed_path
from edt_core.files.small_files import read_json
from edt_core.network.answers import check_connects
from edt_core.network.hub import HUB_ID
from edt_core.store.errors import clear_disk_errors, clear_read_errors
from edt_core.store.folder import Folder, fsync_file, in_threads, sha256_file
from edt_core.store.manifest import sha256_json

_SHA256 = re.compile("[0-9a-f]{64}")
_CHUNK = 1 << 20
_PAUSE_S = 60  # the longest wait for the next bytes of a download


def published_weights(name: str, location: str | None, sha256: str | None = None) -> tuple[str, str]:
    """(local path or hub id, digest) of the option `<name>.weights`; `sha256`, if stated, must be its digest.

    The digest of a file is its sha256; of a folder, that of the JSON of its files' names and digests; of a hub id,
    "hub:<id>". A download is stored in this node's cache and verified at each use.
    Raises UserError if the weights are missing or differ from the stated digest.
    """
    spec = extractor_spec(name)
    if not location:
        raise UserError(f"{name}.weights is not set. Needed are {spec.needed}")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise UserError(f"{name}.sha256 is {sha256!r}; a sha256 is 64 digits 0-9 and a-f")
    if "://" in location and not location.startswith("file://"):
        return _of_url(spec, location, sha256)
    path = typed_path(location.removeprefix("file://")).absolute()
    if not path.exists():
        if spec.is_folder and HUB_ID.fullmatch(location):
            return _of_hub(name, location, sha256)
        raise UserError(f"{name}.weights is {location}, which does not exist. Needed are {spec.needed}")
    if path.is_dir() != spec.is_folder:
        kind, expected = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise UserError(f"{name}.weights is {location}, which is {kind}, not {expected}. Needed are {spec.needed}")
    with clear_read_errors(str(path)):
        digest = _folder_digest(spec, path) if path.is_dir() else sha256_file(path)
    if sha256 not in (None, digest):
        raise UserError(_mismatch(name, str(path), digest, str(sha256)))
    return str(path), digest


def feature_dimensions(name: str, location: str | None) -> int | None:
    """The number of features of a network with published weights; None if only loading it can show that."""
    spec = extractor_spec(name)
    if spec.dimensions is not None or spec.dimension_field is None or not location or "://" in location:
        return spec.dimensions
    path = typed_path(location) / "config.json"
    try:
        size = read_json(path)[spec.dimension_field] if path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # loading the network will report the problem
    return size if isinstance(size, int) else None


def _folder_digest(spec: ExtractorSpec, folder: Path) -> str:
    names = Folder.at(folder).walk()
    if "config.json" not in names:
        raise UserError(f"{spec.name}.weights is {folder}, which has no config.json. Needed are {spec.needed}")
    return sha256_json(dict(in_threads(lambda name: sha256_file(folder / name), names)))


def _of_hub(name: str, hub_id: str, sha256: str | None) -> tuple[str, str]:
    if sha256 is not None:
        raise UserError(
            f"{name}.sha256 cannot be checked for the hub id {hub_id}; leave it out, or download the files and use "
            "their folder"
        )
    return hub_id, f"hub:{hub_id}"


def _of_url(spec: ExtractorSpec, url: str, sha256: str | None) -> tuple[str, str]:
    """The file of a URL in this node's cache, downloaded if it is missing; one process of a node at a time."""
    place = f"{urlsplit(url).scheme}://{urlsplit(url).netloc.rpartition('@')[2]}{urlsplit(url).path}"  # without tokens
    name = spec.name
    if spec.is_folder:
        raise UserError(f"{name}.weights is {place}, one file; a {spec.title} is a folder. Needed are {spec.needed}")
    if sha256 is None:
        raise UserError(
            f"{name}.weights is {place} without {name}.sha256: the content of a URL can change, and every metric "
            f"with it. Set {name}.sha256 to the digest of the file you mean (sha256sum FILE)"
        )
    from filelock import FileLock

    from edt_core.store.cache import DIRECTORY_VARIABLE, cache_folder

    root = cache_folder()
    file_name = re.sub(r"[^\w.-]", "_", PurePosixPath(urlsplit(url).path).name).strip(".") or "weights"
    target, part = root / "weights" / sha256 / file_name, root / "weights" / f".{sha256}.part"
    with clear_disk_errors(f"the cache {root} (set {DIRECTORY_VARIABLE})"):
        for folder in (root / "weights", root / "locks"):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "locks" / f"weights-{sha256[:16]}.lock"):
            if target.is_file() and sha256_file(target) == sha256:
                return str(target), sha256
            try:
                digest = _download(url, place, part)
                if digest != sha256:
                    raise UserError(_mismatch(name, f"{place} ({part.stat().st_size} bytes)", digest, sha256))
                fsync_file(part)
                target.parent.mkdir(exist_ok=True)
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
    return str(target), sha256


def _download(url: str, place: str, target: Path) -> str:
    """Download a URL to a local file; return its sha256. Raises UserError if it cannot be downloaded.

    HTTP does not use fsspec, whose client reads by ranges, which not every server supports, gives up after five
    minutes, and ignores proxies.
    """
    try:
        if urlsplit(url).scheme not in ("http", "https"):
            parent, _, file_name = url.rpartition("/")
            return Folder.at(parent).fetch(file_name, target)
        digest, remedy = hashlib.sha256(), "check the URL and the network, or download it elsewhere and use its path"
        opened = check_connects(lambda: urllib.request.urlopen(url, timeout=_PAUSE_S), place, "a file", remedy)
        with opened as source, target.open("wb") as file:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
        return digest.hexdigest()
    except (FileNotFoundError, URLError, TimeoutError, ConnectionError, HTTPException) as error:
        raise UserError(
            f"cannot download {place}: {error}; check the URL and the network, or download the file elsewhere and use "
            "its path"
        ) from error


def _mismatch(name: str, place: str, digest: str, stated: str) -> str:
    return (
        f"{place} has sha256 {digest[:12]}, but {name}.sha256 is {stated[:12]}; it is not used. Download it again, "
        f"or set {name}.sha256 to the digest of the file you mean"
    )


def load_tensors(path: Path, needed: str) -> dict[str, Tensor]:
    """The tensors of a `.pth` file by name, on the CPU. No code of the file is run.

    `needed` says, in the message for a missing file, which weights to get (`ExtractorSpec.needed`).
    Raises UserError for a file that is missing or damaged, or contains anything but named tensors.
    """
    if not path.is_file():
        raise UserError(f"the file {path} does not exist. Needed are {needed}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the errors of torch's three formats differ
        raise UserError(
            f"{path} contains pickled code or is not a file of tensors; it is not loaded ({_reason(error)}). "
            "Download the published file again, and state its sha256"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise UserError(
            f"{path} contains a {type(loaded).__name__}, not tensors by name; use the published file itself"
        )
    return {str(name): tensor for name, tensor in loaded.items()}


def _reason(error: Exception) -> str:
    """The reason in torch's message, without its advice to load the file unsafely."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = next((line for line in lines if "unsupported" in line.lower()), lines[0])
    sentence = re.split(r"\. |\.$", line.removeprefix("WeightsUnpickler error:").strip())[0]
    return f"{type(error).__name__}: {sentence}".removesuffix(": ")

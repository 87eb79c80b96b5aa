"""Weights of published networks: found where the user says, checked by digest, read without running their code.

Nothing is ever replaced by something else: what is missing is an error that says where people get it.
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
_PAUSE_S = 60  # between two pieces of a download that has begun


def published_weights(name: str, location: str | None, sha256: str | None = None) -> tuple[str, str]:
    """(local path or hub id, digest) of what the option `<name>.weights` says; `sha256` must be its digest if stated.

    The digest is the sha256 of the file; of a folder, that of the JSON of its files' names and digests; of a hub id,
    "hub:<id>". What a URL holds is kept in this node's cache and checked at each use.
    Raises UserError where there is nothing, or something else than what was stated.
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
        raise UserError(f"{name}.weights is {location}, and there is nothing. Needed are {spec.needed}")
    if path.is_dir() != spec.is_folder:
        kind, wanted = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise UserError(f"{name}.weights is {location}, which is {kind}, not {wanted}. Needed are {spec.needed}")
    with clear_read_errors(str(path)):
        digest = _folder_digest(spec, path) if path.is_dir() else sha256_file(path)
    if sha256 not in (None, digest):
        raise UserError(_mismatch(name, str(path), digest, str(sha256)))
    return str(path), digest


def feature_dimensions(name: str, location: str | None) -> int | None:
    """How many features the network of published weights has; None where only loading it tells."""
    spec = extractor_spec(name)
    if spec.dimensions is not None or spec.dimension_field is None or not location or "://" in location:
        return spec.dimensions
    path = typed_path(location) / "config.json"
    try:
        size = read_json(path)[spec.dimension_field] if path.is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # loading the network says what is wrong with it
    return size if isinstance(size, int) else None


def _folder_digest(spec: ExtractorSpec, folder: Path) -> str:
    names = Folder.at(folder).walk()
    if "config.json" not in names:
        raise UserError(f"{spec.name}.weights is {folder}, which holds no config.json. Needed are {spec.needed}")
    return sha256_json(dict(in_threads(lambda name: sha256_file(folder / name), names)))


def _of_hub(name: str, hub_id: str, sha256: str | None) -> tuple[str, str]:
    if sha256 is not None:
        raise UserError(
            f"{name}.sha256 cannot be checked for the hub id {hub_id}; leave it out, or download the files and give "
            "their folder"
        )
    return hub_id, f"hub:{hub_id}"


def _of_url(spec: ExtractorSpec, url: str, sha256: str | None) -> tuple[str, str]:
    """The file of a URL in this node's cache, downloaded unless it is there; processes of a node take turns."""
    place = f"{urlsplit(url).scheme}://{urlsplit(url).netloc.rpartition('@')[2]}{urlsplit(url).path}"  # without tokens
    name = spec.name
    if spec.is_folder:
        raise UserError(f"{name}.weights is {place}, one file; a {spec.title} is a folder. Needed are {spec.needed}")
    if sha256 is None:
        raise UserError(
            f"{name}.weights is {place} without {name}.sha256: what a URL gives can change from one "
            "day to the next, and every metric with it. State the digest of the file you mean (sha256sum FILE)"
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
    """Write what a URL gives to a local file; returns its sha256. Raises UserError where it gives nothing.

    The web goes without fsspec: its client reads by ranges, which not every server knows, gives up after five minutes,
    and knows no proxy.
    """
    try:
        if urlsplit(url).scheme not in ("http", "https"):
            parent, _, file_name = url.rpartition("/")
            return Folder.at(parent).fetch(file_name, target)
        digest, remedy = hashlib.sha256(), "check the URL and the network, or download it elsewhere and give its path"
        opened = check_connects(lambda: urllib.request.urlopen(url, timeout=_PAUSE_S), place, "a file", remedy)
        with opened as source, target.open("wb") as file:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
        return digest.hexdigest()
    except (FileNotFoundError, URLError, TimeoutError, ConnectionError, HTTPException) as error:
        raise UserError(
            f"cannot download {place}: {error}; check the URL and the network, or download the file elsewhere and give "
            "its path"
        ) from error


def _mismatch(name: str, place: str, digest: str, stated: str) -> str:
    return (
        f"{place} has sha256 {digest[:12]}, {name}.sha256 says {stated[:12]}; it is not used. Take it again, "
        "or state the digest of what you mean"
    )


def load_tensors(path: Path, needed: str) -> dict[str, Tensor]:
    """The tensors of a `.pth` file, by name, in memory of the CPU. No code of the file is run.

    `needed`: what to get where the file is missing, as a spec says.
    Raises UserError for a file that is missing, is damaged, or holds anything but named tensors.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}. Needed are {needed}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its three formats raise
        raise UserError(
            f"{path} holds pickled code or is not a file of tensors; it is not loaded ({_reason(error)}). "
            "Take the published file again, and state its sha256"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not tensors by name; give the published file itself")
    return {str(name): tensor for name, tensor in loaded.items()}


def _reason(error: Exception) -> str:
    """What torch found, without its advice to load the file all the same."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = next((line for line in lines if "unsupported" in line.lower()), lines[0])
    sentence = re.split(r"\. |\.$", line.removeprefix("WeightsUnpickler error:").strip())[0]
    return f"{type(error).__name__}: {sentence}".removesuffix(": ")

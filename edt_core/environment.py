"""Defaults for environment variables of libraries, and the part of the environment that a manifest records."""

import gc
import logging
import os
import platform
import pwd
import re
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_DRIVER_QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
_DRIVER_FILE = Path("/proc/driver/nvidia/version")  # of the kernel module, also in containers without nvidia-smi
_PROBE_SECONDS = 20

RECORDED_PACKAGES = (
    "edt-pipeline",
    "torch",
    "ray",
    "mlflow",
    "diffusers",
    "transformers",
    "pyarrow",
    "webdataset",
    "numpy",
    "pillow",
    "pillow-heif",
    "pillow-jxl-plugin",
    "pillow-avif-plugin",
    "simplejpeg",
    "torchao",
)
# Loggers that warn when torchao is imported, as diffusers does if it is installed, of what is not used here: kernels
# for CUDA on a machine without, and tensors of older versions.
_OF_TORCHAO = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")


def quiet_defaults() -> None:
    """Turn off usage reporting of Ray and MLflow unless the user enabled it. Call before importing either.

    WDS_SECURE makes webdataset refuse pickles and `pipe:` URLs. A user id without an account gets a home folder.
    """
    _complete_user()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("WDS_SECURE", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for name in _OF_TORCHAO:
        logging.getLogger(name).setLevel(logging.ERROR)


def collect_rarely() -> None:
    """Have Python look through all objects for garbage at 700,000 new ones instead of 70,000; young ones as often.

    An import of torch and diffusers makes 420,000 objects that stay, and a sixth of its processor time went into
    looking for garbage among them. Call before importing either.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, max(old, 100))


def _complete_user() -> None:
    """Set a user name and a home folder, which libraries need, for a user id without an account, as in containers."""
    user = os.getuid()
    try:
        pwd.getpwuid(user)
        return
    except KeyError:
        pass
    os.environ.setdefault("LOGNAME", f"uid-{user}")
    home = os.environ.get("HOME", "")
    if not home or (home == "/" and not os.access(home, os.W_OK)):
        os.environ["HOME"] = _temporary_home(user)


def _temporary_home(user: int) -> str:
    """A private folder of this user: the same one each time, unless another user owns its name."""
    home = Path(tempfile.gettempdir()) / f"edt-home-{user}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        status = home.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == user and not status.st_mode & 0o022:
            return str(home)
    except OSError:
        pass
    return tempfile.mkdtemp(prefix="edt-home-")


@cache  # it searches the whole path, for every manifest
def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, str]:
    """Versions and platform, from a fixed list: never the environment variables themselves."""
    versions = {package: _installed(package) for package in RECORDED_PACKAGES}
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        **{package: number for package, number in versions.items() if number},
    }


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, such as 580.65.06; None if there is none."""
    try:
        text = subprocess.run(
            _DRIVER_QUERY, check=True, capture_output=True, encoding="utf-8", timeout=_PROBE_SECONDS
        ).stdout
    except (OSError, subprocess.SubprocessError):
        text = ""
    if not (lines := text.strip().splitlines()):
        with suppress(OSError):
            lines = _DRIVER_FILE.read_text(encoding="utf-8", errors="replace").splitlines()
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", lines[0]) if lines else None
    return found[0] if found else None


def utc(seconds: float | None = None) -> str:
    """A time (default: now) in seconds since 1970 in the format of records: ISO 8601, UTC, whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


@cache
def code_version() -> str:
    """Commit of the clone that the code runs from (`+dirty` with uncommitted changes), else the installed version."""
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        try:
            commit = _git(root, "rev-parse", "HEAD")
            return commit + ("+dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
        except (OSError, subprocess.CalledProcessError):
            pass
    return _installed("edt-pipeline") or "unknown"


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, encoding="utf-8", timeout=10
    ).stdout.strip()

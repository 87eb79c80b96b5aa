"""The version of NVIDIA's driver, from nvidia-smi or the kernel module's file; and how often garbage is collected."""

import gc
import runpy
import subprocess
from pathlib import Path

import pytest

from edt_core import environment

MODULE = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build  (builder)
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""


def answer(monkeypatch: pytest.MonkeyPatch, result: str | Exception, module: Path) -> None:
    """What nvidia-smi prints, or how it fails, and the place of the kernel module's file."""

    def run(command: tuple[str, ...], **_: object) -> "subprocess.CompletedProcess[str]":
        assert command[0] == "nvidia-smi"
        if isinstance(result, Exception):
            raise result
        return subprocess.CompletedProcess(command, 0, stdout=result)

    monkeypatch.setattr(environment.subprocess, "run", run)
    monkeypatch.setattr(environment, "_DRIVER_FILE", module)


FAILURES = [
    FileNotFoundError("nvidia-smi"),
    PermissionError("nvidia-smi"),
    subprocess.CalledProcessError(9, "nvidia-smi"),
    subprocess.TimeoutExpired("nvidia-smi", 20),
    "",
    "\n",
]


@pytest.mark.parametrize("text", ["580.65.06\n", "580.65.06\n580.65.06\n", "  580.65.06  \n"])
def test_the_driver_is_what_nvidia_smi_prints(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "version"
    module.write_text(MODULE)
    answer(monkeypatch, text, module)
    assert environment.nvidia_driver() == "580.65.06"


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_the_driver_is_that_of_the_kernel_module_where_nvidia_smi_fails(
    failure: str | Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "version"
    module.write_text(MODULE)
    answer(monkeypatch, failure, module)
    assert environment.nvidia_driver() == "570.86.10"
    module.write_bytes(b"\xff\xfe no number\n")
    assert environment.nvidia_driver() is None
    module.unlink()
    assert environment.nvidia_driver() is None


def test_what_imports_much_looks_through_all_objects_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first line; a user's own rarer setting stays, and how often young objects are looked at as well."""
    settings: list[tuple[int, ...]] = []
    monkeypatch.setattr(gc, "set_threshold", lambda *values: settings.append(values))
    for before in ((700, 10, 10), (700, 10, 5000)):
        monkeypatch.setattr(gc, "get_threshold", lambda before=before: before)
        for package in ("jobs", "pipelines"):
            runpy.run_module(f"{package}.__init__")
    assert settings == [(700, 10, 100)] * 2 + [(700, 10, 5000)] * 2

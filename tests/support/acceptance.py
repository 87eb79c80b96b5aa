"""The file of an acceptance, with the rates of a GPU that are made up."""

from typing import Any

from edt_core.acceptance.command import FORMAT

HEAD = {
    "format": FORMAT,
    "card": "NVIDIA H100 80GB HBM3",
    "memory_gib": 79.2,
    "cores": 64,
    "driver": "580.65.06",
    "python": "3.12.3",
    "torch": "2.13.0+cu130",
    "cuda": "13.0",
    "cudnn": 92000,
    "nccl": "2.29.7",
    "code": "3f2a9c1" + "0" * 33,
    "started": "2026-11-29T20:11:07Z",
}
# Made-up rates: (section, name, value, unit, note).
ROWS: tuple[tuple[str, str, float | None, str, str], ...] = (
    ("A", "EDT-S/2, fp32: output", 1e-6, "rel. rms", ""),
    ("C", "matrix product, bf16", 600.0, "TFLOP/s", ""),
    ("C", "matrix product, tf32", 300.0, "TFLOP/s", ""),
    ("C", "matrix product, fp32", 50.0, "TFLOP/s", ""),
    ("C", "EDT-S/2 at 256, bf16 compiled: first step", 41.0, "s", ""),
    ("C", "EDT-S/2 at 256, bf16 eager", 4000.0, "images/s", ""),
    ("C", "EDT-S/2 at 256, bf16 compiled", 6000.0, "images/s", ""),
    ("C", "EDT-S/2 at 32, bf16 compiled", 5000.0, "images/s", ""),
    ("C", "EDT-S/2 at 256, plain tf32, Adan", 1000.0, "images/s", ""),
    ("C", "EDT-XL/2 at 64, bf16 compiled", 400.0, "images/s", ""),
    ("C", "EDT-B/2 at 128, bf16 eager", None, "images/s", "out of memory"),
    ("D", "sampling, EDT-S/2 fp32, no AMM", 80.0, "images/s", "10 steps, guided; 3.20 images/s at 250 steps"),
    ("D", "sampling, EDT-S/2 fp32, AMM", 75.0, "images/s", "10 steps, guided; 3.00 images/s at 250 steps"),
    (
        "D",
        "sampling, EDT-S/2 bf16 compiled, no AMM",
        500.0,
        "images/s",
        "10 steps, guided; 20.00 images/s at 250 steps",
    ),
    ("D", "encoding at 256 px, fp32, channels first", 100.0, "images/s", "a network of SD-VAE's shape; 16 images"),
    ("D", "encoding at 256 px, fp32, channels last", 1.0, "images/s", "a network of SD-VAE's shape; 16 images"),
    ("D", "decoding at 256 px, fp32, channels first", 50.0, "images/s", "a network of SD-VAE's shape; 16 images"),
    ("D", "decoding 8 images at 512 px at once, fp32", 12.0, "images/s", ""),
    ("E", "feeding, batch 256, one rank of 8", 90_000.0, "images/s", ""),
)


def row(section: str, name: str, value: float | None, unit: str, note: str) -> dict[str, Any]:
    passed = True if section == "A" else None
    return {
        "section": section,
        "name": name,
        "value": value,
        "unit": unit,
        "bound": "",
        "passed": passed,
        "seconds": 1.0,
        "note": note,
    }


def content(*left_out: str, **head: Any) -> dict[str, Any]:
    """A file with all rows but those whose name starts with one of these texts."""
    return {**HEAD, **head, "rows": [row(*fields) for fields in ROWS if not fields[1].startswith(left_out)]}

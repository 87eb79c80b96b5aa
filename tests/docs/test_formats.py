"""docs/formats.md is enough to read what the pipeline writes: a reader that imports nothing of it, as the page tells.

Legend: C latent channels, h side of the latents.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from safetensors.numpy import load_file

from edt_core.data.latents import LatentShard, LatentShardWriter
from edt_core.store.folder import Folder
from tests.support.models import made_model, opened
from tests.support.posthoc import with_snapshots

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


# --- the reader


def digest_of_json(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def read_artifact(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the files and the manifest of an artifact, every promise of the page checked."""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["schema_version"] == 2
    assert manifest["seal"] == digest_of_json({k: v for k, v in manifest.items() if k != "seal"})
    files = sorted(manifest["files"], key=lambda file: file["path"])
    assert manifest["digest"] == digest_of_json([[f["path"], f["bytes"], f["sha256"]] for f in files])
    root = folder / manifest["attempt"]
    for file in files:
        data = (root / file["path"]).read_bytes()
        assert (len(data), sha256(data).hexdigest()) == (file["bytes"], file["sha256"])
    there = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    visible = {str(path) for path in there if not any(part.startswith(".") for part in path.parts)}
    assert visible - {"manifest.json"} == {file["path"] for file in files}
    return root, manifest


def read_images(path: Path) -> Iterator[tuple[str, int, dict[str, Any], Image.Image]]:
    """Key, class, what is told of it, and the picture, of an image shard."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[extension] = file.read()
    for key, sample in samples.items():
        picture = next(sample[name] for name in ("webp", "png", "jpg") if name in sample)
        yield key, int(sample["cls"]), json.loads(sample["json"]), Image.open(BytesIO(picture))


def read_latents(path: Path) -> tuple[dict[str, Any], list[str], list[int], np.ndarray]:
    """Metadata, keys, classes and posterior float32 [n, 2, 2, C, h, h] (side, mean or std) of a latent shard."""
    with pa.OSFile(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    about = {name.decode(): json.loads(value) for name, value in table.schema.metadata.items()}
    sides = [np.stack(table[name].to_numpy()) for name in ("posterior", "mirror_posterior")]
    stored = {"fp16": np.float16, "bf16": np.uint16}.get(about.get("store"), np.float32)
    assert [side.dtype for side in sides] == [stored, stored]
    if about.get("store") == "bf16":
        sides = [(side.astype(np.uint32) << 16).view(np.float32) for side in sides]
    sides = [side.astype(np.float32) for side in sides]
    posterior = np.stack([side.reshape(-1, 2, *about["latent_shape"]) for side in sides], axis=1)
    return about, table["key"].to_pylist(), table["label"].to_pylist(), posterior


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """The manifest of a checkpoint and its tensors by file."""
    stated = json.loads((folder / "checkpoint.json").read_text())
    assert stated["version"] == 3
    assert stated["seal"] == digest_of_json({k: v for k, v in stated.items() if k != "seal"})
    assert {name: sha256((folder / name).read_bytes()).hexdigest() for name in stated["files"]} == stated["files"]
    return stated, {name: load_file(folder / name) for name in stated["files"] if name.endswith(".safetensors")}


def read_bfloat16(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a file states of its average, and its tensors as float32: bfloat16 is the upper half of one."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    about = json.loads(header.pop("__metadata__")["average"])
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "BF16"
        first, last = (start + offset for offset in entry["data_offsets"])
        halves = np.frombuffer(data[first:last], "<u2").astype(np.uint32)
        tensors[name] = (halves << 16).view(np.float32).reshape(entry["shape"])
    return about, tensors


# --- what a run wrote


@dataclass(frozen=True)
class Artifacts:
    """The artifacts of a run by kind, the newest of each."""

    root: Path

    def folders(self, kind: str) -> list[Path]:
        found = [path.parent for path in self.root.glob(f"{kind}/*/manifest.json")]
        assert found, f"no {kind}"
        return sorted(found)

    def read(self, kind: str) -> tuple[Path, dict[str, Any]]:
        read = [read_artifact(folder) for folder in self.folders(kind)]
        return max(read, key=lambda pair: (pair[1]["counts"].get("steps", 0), pair[1]["created_at"]))


@pytest.fixture(scope="module")
def artifacts(store: Path, first: object) -> Artifacts:
    return Artifacts(store)


def test_every_manifest_agrees_with_the_page(artifacts: Artifacts) -> None:
    kinds = {path.parent.parent.name for path in artifacts.root.glob("*/*/manifest.json")}
    page = PAGE.read_text()
    assert kinds == {
        *("images", "autoencoder", "latents", "classifier", "checkpoint"),
        *("reference", "features", "evaluation", "report"),
    }
    for kind in kinds:
        assert f"`{kind}`" in page
        for folder in artifacts.folders(kind):
            _, manifest = read_artifact(folder)
            assert (manifest["kind"], manifest["fingerprint"]) == (kind, folder.name)
            assert not [field for field in manifest if f"`{field}`" not in page]
            named = {"kind": kind, "version": manifest["step_version"]}
            identity = digest_of_json({**named, "config": manifest["config"], "inputs": manifest["inputs"]})
            assert kind == "report" or identity == folder.name


def test_latents_are_rows_of_the_images_in_the_layout_of_the_page(artifacts: Artifacts) -> None:
    (images_root, images), (root, latents) = artifacts.read("images"), artifacts.read("latents")
    classes = json.loads((images_root / "classes.json").read_text())
    assert len(classes) == images["counts"]["classes"]
    rows = 0
    for number, path in enumerate(sorted(images_root.glob("images-*.tar"))):
        pictures = list(read_images(path))
        about, keys, labels, posterior = read_latents(root / f"latents-{number:05d}.arrow")
        assert about["source_shard"] == path.name
        assert about["schema_version"] == "2"
        assert about["autoencoder"] == f"fitted@{latents['counts']['autoencoder_digest']}"
        assert [key for key, *_ in pictures] == keys
        assert [label for _, label, *_ in pictures] == labels
        assert posterior.shape == (len(keys), 2, 2, *latents["counts"]["latent_shape"])
        assert (posterior[:, :, 1] > 0).all(), "standard deviations"
        assert not np.array_equal(posterior[:, 0], posterior[:, 1])
        for _, label, told, picture in pictures:
            assert told["label"] == label
            assert told["source"].startswith(classes[label])
            assert (picture.mode, picture.size) == ("RGB", (images["counts"]["image_size"],) * 2)
        rows += len(pictures)
    assert rows == images["counts"]["images"] == latents["counts"]["images"]


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_half_precision_is_in_the_layout_of_the_page(half: str, artifacts: Artifacts, tmp_path: Path) -> None:
    root, _ = artifacts.read("latents")
    path = min(root.glob("latents-*.arrow"))
    _, keys, labels, exact = read_latents(path)
    with LatentShardWriter(tmp_path / "half.arrow", replace(LatentShard(path).info, store=half)) as writer:
        writer.write(keys, labels, exact)
    about, *rows, posterior = read_latents(tmp_path / "half.arrow")
    assert (about["schema_version"], about["store"]) == ("4", half)
    assert rows == [keys, labels]
    gap = np.abs(posterior - exact)
    assert 0 < gap.max() <= np.abs(exact).max() * 2.0 ** (-11 if half == "fp16" else -8)
    with pa.OSFile(str(tmp_path / "half.arrow")) as file:
        rounding = np.stack(pa.ipc.open_file(file).read_all()["rounding"].to_numpy())
    assert np.array_equal(rounding.reshape(len(keys), 2, -1), gap.max((1, 4, 5)))


def test_a_checkpoint_holds_what_the_page_says(artifacts: Artifacts) -> None:
    root, manifest = artifacts.read("checkpoint")
    counts = manifest["counts"]
    stated, tensors = read_checkpoint(root / counts["final"])
    assert counts["final"] == f"checkpoints/step-{stated['step']:08d}"
    model, ema = tensors["model.safetensors"], tensors["ema.safetensors"]
    assert {name: value.shape for name, value in model.items()} == {name: value.shape for name, value in ema.items()}
    trained = sum(value.size for value in model.values())
    assert trained >= counts["parameters"] > 0
    assert tensors["timesteps.safetensors"]["losses"].shape == (1000, 10)
    assert tensors["timesteps.safetensors"]["counts"].sum() == counts["images_seen"]
    assert all(name.split(".", 1)[0].isdecimal() for name in tensors["optimizer.safetensors"])
    config = json.loads((root / counts["final"] / "model_config.json").read_text())
    (labels,) = (value for name, value in ema.items() if "embedding_table" in name)
    assert len(labels) == config["num_classes"] + 1, "the last one is of no class"
    state = json.loads((root / counts["final"] / "state.json").read_text())
    assert state["cursor"]["position"] == counts["images_seen"]
    assert state["config"] == manifest["config"]
    history = [json.loads(line) for line in (root / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in history][-1] == stated["step"]


def test_snapshots_are_the_averages_of_the_page(tmp_path: Path) -> None:
    """Of weights that grow in equal steps to those of the final model."""
    made, _ = with_snapshots(opened(tmp_path, made_model()), made_model(), Folder.at(tmp_path / "store"))
    root, manifest = read_artifact(Path(made.folder.uri))
    final = load_file(root / manifest["counts"]["final"] / "ema.safetensors")
    files = sorted((root / "snapshots").glob("step-*/ema-width-*.safetensors"))
    assert len(files) == 20
    for path in files:
        about, tensors = read_bfloat16(path)
        steps, width = about["step"], about["width"]
        assert path.relative_to(root).as_posix() == f"snapshots/step-{steps:08d}/ema-width-{width}.safetensors"
        exponent = np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max()
        average = 0.0
        for step in range(1, steps + 1):
            average += (1 - (1 - 1 / step) ** (exponent + 1)) * (step / 40 - average)
        assert tensors.keys() < final.keys()
        for name, value in tensors.items():
            np.testing.assert_allclose(value, average * final[name], rtol=2**-8, atol=1e-6)


def test_features_and_reference_are_tensors_of_the_names_of_the_page(artifacts: Artifacts) -> None:
    root, features = artifacts.read("features")
    units = [load_file(path) for path in sorted(root.glob("unit-*.safetensors"))]
    assert np.concatenate([unit["indices"] for unit in units]).tolist() == list(range(features["counts"]["samples"]))
    size = features["counts"]["image_size"]
    assert units[0]["images"].dtype == np.uint8
    assert units[0]["images"].shape[1:] == (size, size, 3)
    reference = load_file(artifacts.read("reference")[0] / "reference.safetensors")
    rows = reference["classifier.features"].astype(np.float64)
    assert int(reference["classifier.count"].item()) == len(rows), "of so few images all features are kept"
    np.testing.assert_allclose(reference["classifier.mean"], rows.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(reference["classifier.covariance"], np.cov(rows.T), rtol=1e-6, atol=1e-9)
    metrics = json.loads((artifacts.read("evaluation")[0] / "metrics.json").read_text())
    assert set(metrics) == {"metrics", "protocol", "repeats", "warnings"}

"""`edt compare` and `edt cost`: like with like, and costs as they were recorded."""

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from edt_core.config import TrainConfig, result_fields
from edt_core.errors import UserError
from edt_core.models import count_macs, macs_by_part, model_config, shadow, training_flops
from edt_core.store.artifact import ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import MODEL_CONFIG
from pipelines.cli import app
from pipelines.registry.compare import compare, costs_of
from pipelines.registry.compare_figure import draw
from pipelines.registry.lookup import record_of
from tests.support.registry import PROTOCOL, Registry


def costs(model: str, steps: int, image_size: int = 256, **more: Any) -> dict[str, Any]:
    """Counts of a training of 256 images a step."""
    flops = steps * 256 * training_flops(model_config(model, image_size), masked=True)
    spent = {"images_seen": steps * 256, "training_flops": flops, "device_hours": steps / 1000}
    return {"model": model, "image_size": image_size, "steps": steps, **spent, **more}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """Two versions of one model, one of a larger, one by another protocol, one of which nothing is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        registry = Registry(tmp_path_factory.mktemp("registry") / "store")
        registry.add("a", 9.0, name="edt-s", fid=40.0, costs=costs("EDT-S/2", 200_000))
        registry.add("b", 8.0, name="edt-s", fid=35.0, fid_std=0.3, costs=costs("EDT-S/2", 400_000))
        registry.add("c", 7.0, name="edt-b", fid=20.0, costs=costs("EDT-B/2", 400_000))
        other = {**PROTOCOL, "num_samples": 50_000}
        registry.add("d", 6.0, name="edt-other", fid=15.0, protocol=other, costs=costs("EDT-B/2", 500_000))
        registry.add("e", 5.0, name="edt-old")
        yield registry


def edt(registry: Registry | None, *arguments: str) -> str:
    """Output of a command that ends well. A user's error is raised."""
    done = CliRunner().invoke(app, [*arguments, *(registry.arguments if registry else [])])
    if done.exception is not None:
        raise done.exception
    return done.output


def test_metrics_stand_beside_what_they_cost(registry: Registry) -> None:
    told = edt(registry, "compare", "edt-s/1", "edt-s/2", "edt-b", "--metric", "fid")
    lines = told.splitlines()
    columns = ["version", "model", "steps", "training_flops", "images_seen", "device_hours", "fid"]
    assert lines[0].split() == columns
    assert lines[1].split() == ["edt-s/1", "EDT-S/2", "200000", "1.639e+18", "51200000", "200", "40"]
    assert lines[2].endswith("35 ± 0.3")
    assert "NOT comparable" not in told
    found = json.loads(edt(registry, "compare", "edt-s/1", "edt-b", "--metric", "fid", "--json"))
    points = {point["label"]: point for point in found["points"]}
    assert points["edt-b/1"]["training_flops"] == costs("EDT-B/2", 400_000)["training_flops"]


def test_published_values_stand_beside_fid_of_their_size_and_guidance_alone(registry: Registry) -> None:
    records = [record_of(registry.catalog, text) for text in ("edt-s/2", "edt-b")]
    with_fid = compare(records, "fid")
    assert with_fid.published, "the protocol of these is guided"
    assert all("guided" in point.label for point in with_fid.published)
    (edt_xl,) = (point for point in with_fid.published if point.label.startswith("EDT-XL"))
    assert (edt_xl.value, edt_xl.images_seen, edt_xl.source) == (3.54, 2_000_000 * 256, "arXiv 2410.23788")
    assert edt_xl.training_flops == edt_xl.images_seen * training_flops(model_config("EDT-XL/2"), masked=True)
    others = compare(records)
    assert others.metric == "fd_classifier"
    assert not others.published
    assert "no published values for fd_classifier" in others.notes[-1]
    small = [record_of(registry.catalog, "edt-old")]
    assert not compare(small).published
    forced = compare(small, with_published=True).published
    assert {point.value for point in forced} >= {34.27, 19.18, 7.52, 3.54}


def test_what_was_measured_otherwise_is_marked(registry: Registry) -> None:
    told = edt(registry, "compare", "edt-s/2", "edt-other", "--metric", "fid")
    (line,) = (line for line in told.splitlines() if line.startswith("edt-other"))
    assert line.endswith("15 *")
    assert "* edt-other/1 is NOT comparable with edt-s/2" in told
    assert "num_samples 50000 / 500" in told


def test_what_is_not_recorded_is_said(registry: Registry) -> None:
    told = edt(registry, "compare", "edt-s/2", "edt-old")
    assert "training FLOPs not recorded: edt-old/1" in told
    assert "device-hours not recorded: edt-old/1" in told
    with pytest.raises(UserError, match=r"edt-old/1 has no metric 'fid'; it has fd_classifier"):
        edt(registry, "compare", "edt-s/2", "edt-old", "--metric", "fid")


def test_costs_of_an_older_version_are_told_from_its_checkpoint(tmp_path: Path) -> None:
    config, train = model_config("EDT-Tiny/2", 32, 10), TrainConfig(model="EDT-Tiny/2", global_batch_size=64)
    out = ArtifactWriter(Folder.at(tmp_path), "checkpoint", "f" * 64)
    out.write_json(f"checkpoints/step-00000100/{MODEL_CONFIG}", config.to_dict())
    counts = {"model": "EDT-Tiny/2", "steps": 100, "final": "checkpoints/step-00000100", "parameters": 5}
    made = out.commit(result_fields(train), {}, counts)

    found = costs_of(SimpleNamespace(tags={"edt.uri": made.folder.uri}))
    assert found["images_seen"] == 6400
    assert found["training_flops"] == 6400 * training_flops(config, masked=True)
    assert (found["image_size"], found["steps"], found["parameters"]) == (32, 100, 5)
    assert "device_hours" not in found


def test_of_a_model_that_was_not_trained_here_only_its_size_is_known(tmp_path: Path) -> None:
    config = model_config("EDT-Tiny/2", 32, 10)
    out = ArtifactWriter(Folder.at(tmp_path), "checkpoint", "f" * 64)
    out.write_json(f"checkpoints/step-00000000/{MODEL_CONFIG}", config.to_dict())
    counts = {"model": "EDT-Tiny/2", "steps": 0, "final": "checkpoints/step-00000000"}
    made = out.commit({"num_timesteps": 1000}, {}, counts)
    tags = {"edt.uri": made.folder.uri, "edt.cost.model": "EDT-Tiny/2", "edt.cost.macs": "7"}
    assert costs_of(SimpleNamespace(tags=tags)) == {"model": "EDT-Tiny/2", "macs": 7}


def test_the_plot_is_a_picture_of_a_stated_width(registry: Registry, tmp_path: Path) -> None:
    target = tmp_path / "new" / "compare.png"
    names = ("edt-s/1", "edt-s/2", "edt-b", "edt-other")
    told = edt(registry, "compare", *names, "--metric", "fid", "--out", str(target))
    assert told.rstrip().endswith("compare.png")
    with Image.open(target) as picture:
        assert picture.size[0] <= 1400
        assert len(set(picture.convert("RGB").getdata())) > 50
    found = compare([record_of(registry.catalog, text) for text in names], "fid")
    assert draw(found) == draw(found) == target.read_bytes()
    nothing_recorded = compare([record_of(registry.catalog, "edt-old")])
    with Image.open(BytesIO(draw(nothing_recorded))) as picture:
        assert picture.size[0] <= 1400


def test_cost_tells_models_in_the_terms_of_the_papers() -> None:
    lines = edt(None, "cost", "EDT-S/2", "--image-size", "256,512").splitlines()
    assert lines[1].split() == ["EDT-S/2", "256", "38.3", "2.67", "2.66", "32.0"]
    assert lines[2].split()[:5] == ["EDT-S/2", "512", "38.5", "13.30", "-"]
    (row,) = json.loads(edt(None, "cost", "EDT-Tiny/2", "--image-size", "32", "--json"))
    assert row["macs"] == count_macs(shadow(model_config("EDT-Tiny/2", 32)))
    assert "cached_macs" not in row


def test_cost_counts_a_cache() -> None:
    cache = "{kind: taylor, interval: 4, order: 3}"
    (row,) = json.loads(edt(None, "cost", "DiT-S/2", "--cache", cache, "--num-sampling-steps", "50", "--json"))
    parts = macs_by_part(model_config("DiT-S/2", 256))
    branches = sum(part.macs for part in parts if part.kind in ("attention", "feed-forward"))
    full = 14  # calls 0, 1, 5, 9, ..., 49
    assert row["cached_macs"] == pytest.approx((full * row["macs"] + (50 - full) * (row["macs"] - branches)) / 50)
    assert "GMACs with cache" in edt(None, "cost", "DiT-S/2", "--cache", cache)


def test_cost_by_module_adds_up() -> None:
    parts = json.loads(edt(None, "cost", "EDT-S/2", "--by-module", "--json"))
    assert sum(part["macs"] for part in parts) == count_macs(shadow(model_config("EDT-S/2")))
    assert edt(None, "cost", "EDT-S/2", "--by-module").splitlines()[-1].split() == ["all", "all", "2.6674", "100.0%"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EDT-Q/2"], "Unknown model 'EDT-Q/2'"),
        (["EDT-S/2", "--image-size", "250"], "Use a multiple of 64"),
        (["EDT-S/2", "--image-size", "0"], "EDT-S/2: latents of 0x0"),
        (["EDT-S/2", "--image-size", "256,large"], "use pixels, or several sizes with commas"),
        (["EDT-S/2", "--image-size", "256,512", "--by-module"], "needs one model and one image size"),
    ],
)
def test_a_cost_that_cannot_be_told_is_one_message(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        edt(None, "cost", *arguments)

"""The model card, read as a model hub reads it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard as HubCard

from edt_core.config import ChainConfig
from edt_core.models import model_config
from pipelines.registry.model_card import ModelCard

CARD = ModelCard(
    name="edt-s-2-256",
    config=model_config("EDT-S/2", 256, 1000),
    parameters=38_305_056,
    macs=2_657_000_000,
    sampling=ChainConfig(cfg_scale=2.0, amm_blocks=(8,)).model_dump(mode="json"),
    license="apache-2.0",
    dataset="flowers",
    metrics={"kid": 0.01, "fid": 12.5},
    protocol={"num_samples": 50_000, "sampler": "ddim", "extractors": {"inception": "abc"}},
    data={"source": "/data/flowers|rare", "images": 1000},
    training={"steps": 400_000},
)


def read(card: ModelCard, folder: Path) -> Any:
    path = folder / "README.md"
    path.write_text(card.text())
    return HubCard.load(path)


def test_a_hub_reads_license_library_task_and_metrics(tmp_path: Path) -> None:
    data = read(CARD, tmp_path).data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "diffusers",
        "unconditional-image-generation",
    )
    assert {"edt", "class-conditional", "arxiv:2410.23788"} <= set(data.tags)
    found = {result.metric_type: (result.metric_value, result.dataset_name) for result in data.eval_results}
    assert found == {"fid": (12.5, "flowers"), "kid": (0.01, "flowers")}
    assert data.eval_results[0].metric_type == "fid"  # the distance goes first


def test_people_read_what_it_is_how_it_was_measured_and_made(tmp_path: Path) -> None:
    text = read(CARD, tmp_path).text
    for line in (
        "| architecture | EDT-S/2: Efficient Diffusion Transformer (arXiv 2410.23788) |",
        "| parameters | 38,305,056 |",
        "| images | 256 x 256 px of 1,000 classes |",
        "| fid | 12.5 |",
        "| extractors.inception | abc |",
        r"| source | /data/flowers\|rare |",
        "| steps | 400000 |",
        "| amm_blocks | 8 |",
        "| guidance_interval | not set |",
        "edt sample edt-s-2-256/VERSION",
    ):
        assert line in text, line
    assert text.rstrip().endswith("apache-2.0")
    assert "## Origin" not in text


def test_fields_that_differ_from_the_named_model_are_named() -> None:
    bare = model_config("EDT-S/2", overrides={"token_enhancement": False, "input_mask_ratio": [0.3, 0.5]})
    text = replace(CARD, config=bare).text()
    assert "| differs from that model.token_enhancement | False |" in text
    assert "| differs from that model.input_mask_ratio | 0.3, 0.5 |" in text
    assert "differs from" not in CARD.text()


def test_normalised_latents_are_named() -> None:
    statistics = {"latents_mean": (0.5,) * 4, "latents_std": (2.0,) * 4}
    normalised = replace(CARD, config=replace(CARD.config, **statistics)).text()
    assert "a factor of 8, normalised by channel |" in normalised
    assert "normalised" not in CARD.text()


def test_what_is_not_known_is_said_and_not_made_up(tmp_path: Path) -> None:
    bare = replace(CARD, license=None, metrics={}, protocol={}, data={}, training={}, origin={"file": "edt.pt"})
    card = read(bare, tmp_path)
    assert card.data.license == "unknown"
    assert card.data.eval_results is None
    assert "Not measured" in card.text
    assert "promote.license" in card.text
    assert "## Data" not in card.text
    assert "| file | edt.pt |" in card.text


@pytest.mark.parametrize("license", ["apache-2.0: no, mine", "'quoted' # and more", "no"])
def test_any_text_is_quoted_in_the_front_matter(license: str, tmp_path: Path) -> None:
    assert read(replace(CARD, license=license, dataset="a: b"), tmp_path).data.license == license

"""Numbers that would fail a run after its training are refused before it, with the fields to change."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edt_core.config import ClassifierConfig
from edt_core.errors import UserError
from edt_core.evaluation.config import EvaluateConfig
from edt_core.evaluation.extractors.classifier import fit_classifier
from edt_core.evaluation.metrics import compute_metrics, space_metrics
from edt_core.evaluation.metrics.sample_size import shortfalls
from edt_core.store.artifact import Source
from jobs.stages.sizes import check_sizes
from pipelines.config.check import problems
from pipelines.config.schema import PipelineConfig, load_config
from pipelines.config.size_check import check_pipeline_sizes, size_problems
from pipelines.plan import plan
from tests.support.small import edt

STREAMED = ("encode.write_webdataset=true", "train.reader=webdataset")  # in shards of 300 images


def configured(*assignments: str) -> PipelineConfig:
    return load_config("quickstart", assignments)


@pytest.mark.parametrize("generated", [3, 4, 8, 9])
@pytest.mark.parametrize("reference", [3, 4, 8, 9])
@pytest.mark.parametrize("metric", space_metrics("classifier"))
@pytest.mark.parametrize("allow", [False, True])
def test_what_is_refused_before_is_what_the_metrics_refuse(
    generated: int, reference: int, metric: str, allow: bool
) -> None:
    rng = np.random.default_rng(0)
    sets = [rng.standard_normal((number, 8)) for number in (generated, reference)]
    try:
        compute_metrics(*sets, [metric], space="classifier", allow_rank_deficient=allow)
        refused = False
    except UserError:
        refused = True
    before = shortfalls(
        [metric],
        "classifier",
        8,
        generated,
        reference,
        generated_kept=generated,
        reference_kept=reference,
        allow_rank_deficient=allow,
    )
    assert bool(list(before)) == refused


@pytest.mark.parametrize(
    ("assignments", "images", "parts"),
    [
        (["classifier.feature_dim=64"], 12, ["fd_classifier", "65 real images", "12", "feature_dim to 11 or less"]),
        (["source.limit=12"], 12, ["source.limit, which is 12"]),
        (["sample.num_samples=64"], 1797, ["fd_classifier", "65 samples", "64", "sample.num_samples to 65"]),
        (["evaluate.allow_rank_deficient=true"], 3, ["precision_classifier", "4 real images", "there are only 3"]),
        (["sample.num_samples=3", "evaluate.metrics=[precision,fid]"], 1797, ["leave precision out"]),
        (["extractors=[inception]", "promote.metric=fid", "source.limit=100"], 100, ["2,049 real images", "limit"]),
        (["classifier.holdout_fraction=0.9", "evaluate.allow_rank_deficient=true"], 5, []),
        (["preprocess.max_shard_bytes=65536", "preprocess.image_size=256"], 1797, ["max_shard_bytes is 65536"]),
        ([*STREAMED, "train.num_workers=7"], 1797, ["num_workers of edt-tiny-digits-32 is 7", "1797 images make 6"]),
        ([*STREAMED, "train.num_workers=6"], 1797, []),
        ([*STREAMED, "train.num_workers=[1,7]"], 1797, ["Use at most 6 workers"]),
        (["classifier.holdout_fraction=0.95"], 5, ["classifier.holdout_fraction 0.95 holds out all 5 images"]),
    ],
)
def test_the_message_names_the_field(assignments: list[str], images: int, parts: list[str]) -> None:
    told = "\n".join(size_problems(configured(*assignments), images))
    for part in parts:
        assert part in told, told
    assert bool(told) == bool(parts)


def test_what_ships_is_large_enough() -> None:
    check_pipeline_sizes(configured(), 1797)
    check_pipeline_sizes(load_config("imagenet256-edt-s", ["source.path=/data"]), 1_281_167)
    assert not size_problems(configured("extractors=[inception]", "promote.metric=kid", "evaluate.metrics=[kid]"), 40)


def test_dinov2_has_the_dimensions_that_its_folder_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 384}')
    config = configured("extractors=[dinov2]", "promote.metric=fd_dinov2", f"dinov2.weights={tmp_path}")
    assert "385 real images" in "\n".join(size_problems(config, 300))


def test_tokens_to_align_with_have_the_width_of_the_network(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 1024}')
    aligned = ("train.align=features", f"dinov2.weights={tmp_path}")
    (problem,) = size_problems(configured(*aligned), 1797)
    assert f"the tokens of {tmp_path} are 1024 wide; set train.align_features to [16, 1024]" in problem
    assert not size_problems(configured(*aligned, "train.align_features=[16, 1024]"), 1797)


def test_models_that_align_with_features_of_the_latents_need_the_same_ones() -> None:
    models = "models={small: {align_features: [16, 384]}, large: {}, plain: {align: null}}"
    message = r"train.align_features is [16, 384] for small and [16, 768] for large, but all models train on the same"
    with pytest.raises(UserError, match=re.escape(message)):
        configured("train.align=features", models)
    (problem,) = problems("quickstart", ["train.align=features", models])
    assert message in str(problem)
    refused = edt("plan", "--set", "train.align=features", "--set", models)
    assert (refused.returncode, message in refused.stderr) == (2, True)
    assert configured("train.align=features", models.replace("{align_features: [16, 384]}", "{}")).token_spaces()


def test_the_samples_along_a_training_are_enough_for_its_metrics() -> None:
    few = ("along.every=100", "along.num_samples=3")
    assert "Set along.num_samples to 4 or more" in "\n".join(size_problems(configured(*few), 1797))
    assert not size_problems(configured(*few, "along.metrics=[fid]"), 1797)


def test_the_images_are_enough_for_the_metrics_along_a_training() -> None:
    """An evaluation of other metrics says nothing of those; one of the same says it once for both."""
    fid = ("evaluate.metrics=[fid]", "evaluate.allow_rank_deficient=true", "source.limit=3")
    assert not size_problems(configured(*fid), 3)
    told = size_problems(configured(*fid, "along.every=100"), 3)
    assert [text.partition(" ")[0] for text in told] == ["precision_classifier", "recall_classifier"]
    for text in told:
        assert "needs at least 4 real images, but there are only 3. Raise source.limit, which is 3, or leave" in text
        assert text.endswith("along.metrics.")
    all_metrics = (fid[1], fid[2], "along.every=100")
    assert len(size_problems(configured(*all_metrics), 3)) == 2


def test_published_statistics_are_of_no_stated_number() -> None:
    config = configured("extractors=[inception]", "promote.metric=fid", "reference_statistics=/ref.npz")
    assert not [text for text in size_problems(config, 40) if "real images" in text]


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("promote.metric=kid", "promote.metric"),
        ("evaluate.metrics=[fid,kid]", "evaluate.metrics"),
        ("along={every: 100, metrics: [fid, kid]}", "along.metrics"),
    ],
)
def test_published_statistics_without_images_give_no_kid(
    field: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Statistics:
        image_shape = None
        spatial_statistics = None

    monkeypatch.setattr("edt_core.evaluation.metrics.read_adm", lambda path: Statistics())
    settings = ["extractors=[inception]", "promote.metric=fid", "reference_statistics=/ref.npz", field]
    config = configured(*settings, "sample.num_samples=3000")
    with pytest.raises(UserError, match=f"{name} requests kid, but /ref.npz contains no images"):
        check_pipeline_sizes(config, 40, Source("/ref.npz", "0" * 64))


def test_plan_dry_run_doctor_and_the_file_s_check_say_it(tmp_path: Path) -> None:
    few = ["source.limit=12", f"store={tmp_path}"]
    with pytest.raises(UserError, match=r"source\.limit, which is 12"):
        plan(configured(*few))
    options = [part for text in few for part in ("--set", text)]
    done = edt("run", "quickstart", *options, "--dry-run", cwd=tmp_path)
    assert (done.returncode, "source.limit, which is 12" in done.stderr) == (2, True), done
    (only,) = problems("quickstart", ["sample.num_samples=12"])
    assert "sample.num_samples to 65 or more" in str(only)


def test_a_run_is_refused_before_it_begins(tmp_path: Path) -> None:
    done = edt("run", "quickstart", "--store", str(tmp_path / "s"), "--set", "source.limit=12", cwd=tmp_path)
    assert (done.returncode, "source.limit, which is 12" in done.stderr) == (2, True), done
    assert not list((tmp_path / "s").glob("images/*"))


def test_doctor_has_a_check_of_it(tmp_path: Path) -> None:
    from pipelines.setup.doctor import setup_of
    from pipelines.setup.doctor_checks import CHECKS

    def found(*assignments: str) -> Any:
        return CHECKS["sizes"][0](setup_of(configured(*assignments), None, None, True))

    assert found()[0] == "ok"
    status, told, remedy = found("source.limit=12")
    assert (status, "12" in told, "source.limit" in remedy) == ("fail", True, True)


def test_a_verb_names_its_options() -> None:
    with pytest.raises(UserError, match=r"--num-samples 17") as caught:
        check_sizes(EvaluateConfig(), {"classifier": 16}, 16, 3, 10_000)
    assert "compare with more images" in str(caught.value).replace("Compare", "compare")


@pytest.mark.parametrize("steps", [1, 10])
def test_a_classifier_is_fitted_in_any_number_of_steps(steps: int) -> None:
    """torch's schedule divides by 0 at ten steps of which a tenth rises."""
    pixels = np.zeros((8, 16, 16, 3), np.uint8)
    fit_classifier(ClassifierConfig(steps=steps, feature_dim=2, base_channels=8), pixels, np.arange(8) % 2, 2)

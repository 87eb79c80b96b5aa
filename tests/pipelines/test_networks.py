"""Networks of features in a pipeline: each has a section, an option and its checks, and stands in no other file."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from edt_core.config import recorded_fields
from edt_core.errors import UserError
from edt_core.evaluation.extractors import EXTRACTORS, PUBLISHED_SPACES, extractor_spec, load_extractor
from edt_core.evaluation.metrics import METRICS, metric_name, space_metrics
from jobs.commands import evaluate_model
from pipelines.config.networks import ExtractorConfig
from pipelines.config.schema import as_yaml, load_config, recorded_yaml
from pipelines.config.size_check import size_problems
from pipelines.pipeline import Published
from pipelines.report.page import compare_metrics
from pipelines.setup.disk import disk_needs
from pipelines.setup.doctor_checks import _optional_packages
from pipelines.setup.doctor_services import _weights
from tests.support.models import clip_folder

ROOT = Path(__file__).parents[2]
CLIP = ("source.path=/data", "extractors=[clip]", "promote.metric=cmmd")


@pytest.mark.parametrize("space", EXTRACTORS)
def test_a_registered_network_is_described(space: str) -> None:
    spec = extractor_spec(space)
    assert spec.name == space
    assert set(spec.metrics) <= set(METRICS)
    options = evaluate_model.make_parser("edt evaluate").format_help()
    assert f"{spec.option} INPUT" in options
    assert spec.suggestion.split()[0] == spec.option
    assert space_metrics(space)[0] == "fid"


@pytest.mark.parametrize("space", PUBLISHED_SPACES)
def test_published_weights_have_a_section_a_place_and_a_remedy(space: str) -> None:
    spec = extractor_spec(space)
    config = load_config("quickstart", [f"{space}.weights=/w"])
    assert isinstance(config.network(space), ExtractorConfig)
    assert config.network(space).weights == "/w"
    weights = type(config.network(space)).model_fields["weights"]
    assert spec.title in str(weights.description)
    assert spec.values_per_sample
    asked = load_config("quickstart", [f"extractors=[{space}]", f"promote.metric={metric_name('fid', space)}"])
    assert disk_needs(asked, 1000, 10)["reference"] > 0
    with pytest.raises(UserError, match=re.escape(f"{space}.weights is not set. Needed are {spec.source}")):
        Published.of(asked, None)
    assert set(_optional_packages(asked, None)) == ({(spec.package, spec.extra)} if spec.package else set())


def test_no_other_file_of_the_product_names_a_network() -> None:
    """Two apart: Inception, of which statistics are published, and the classifier, which a step of a pipeline fits."""
    apart = {space for space in PUBLISHED_SPACES if space != "inception"}
    named = {
        str(path.relative_to(ROOT))
        for package in ("edt_core", "jobs", "pipelines")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in apart
    }
    own = "edt_core/evaluation/extractors"
    assert named == {f"{own}/__init__.py", *(f"{own}/{space}.py" for space in apart)}


def test_clip_is_one_of_a_pipelines_networks(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    config = load_config("imagenet256-edt-s", [*CLIP, f"clip.weights={folder}"])
    source = Published.of(config, None).extractors["clip"]
    assert (source.location, len(source.fingerprint)) == (str(folder), 64)
    assert f"clip {folder} loads, sha256 {source.fingerprint[:12]}" == _weights("clip", config.network("clip"))
    assert not size_problems(config, 13)
    assert "fd_clip needs at least 13 real images" in "\n".join(size_problems(config, 12))
    assert load_extractor("clip", folder).space == "clip"
    with pytest.raises(UserError, match=r"fd_clip, kid_clip, precision_clip, recall_clip, cmmd"):
        load_config("imagenet256-edt-s", ["source.path=/data", "extractors=[clip]", "promote.metric=fid"])
    with pytest.raises(UserError, match=r"evaluate\.metrics\.0"):
        load_config("imagenet256-edt-s", [*CLIP, "evaluate.metrics=[clip_score]"])


def test_a_report_says_what_its_metrics_mean() -> None:
    before, after = {"cmmd": 2.0, "fd_clip": 3.0}, {"cmmd": 0.5, "cmmd_std": 0.1, "fd_clip": 4.0}
    found, distance = compare_metrics(before, after)
    assert (found.name, found.verdict, found.spread) == ("cmmd", "better", 0.1)
    assert "Gaussian kernel" in found.meaning
    assert (distance.name, distance.verdict) == ("fd_clip", "worse")


def test_a_network_that_came_later_is_not_in_records_made_without_it() -> None:
    """Else the reports of the version before would all be written anew."""
    config = load_config("quickstart")
    assert "clip" in yaml.safe_load(as_yaml(config))
    record = yaml.safe_load(recorded_yaml(config))
    assert "clip" not in record
    assert {"inception", "dinov2"} <= set(record)
    given = config.model_copy(update={"clip": type(config.network("clip"))(weights="/w")})
    assert recorded_fields(given)["clip"] == {"weights": "/w", "sha256": None}

"""The verbs on their own: `python -m jobs.<verb>`."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edt_core.config import PreprocessConfig, Section, TrainConfig, result_fields
from edt_core.errors import UserError
from jobs.commands.options import add_fields, given_fields, parse_assignment, validated
from tests.support.jobs import command

VERBS = ["preprocess", "autoencoder", "encode", "classifier", "reference", "train", "sample", "evaluate", "validate"]


def test_what_does_not_change_the_result_is_not_in_the_fields() -> None:
    fields = result_fields(TrainConfig(num_workers=4, checkpoint_every=7))
    assert "lr" in fields
    assert not {"num_workers", "checkpoint_every", "use_gpu", "max_failures", "num_to_keep"} & set(fields)
    assert fields == result_fields(TrainConfig(num_workers=2, checkpoint_every=9))
    assert fields != result_fields(TrainConfig(seed=1))


def test_an_unknown_key_is_named_with_what_it_may_mean_or_else_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown configuration key 'image_sise'; did you mean image_size\?$"):
        validated(PreprocessConfig, {"image_sise": 32})
    with pytest.raises(UserError, match=r"unknown configuration key 'side'; known keys here: .*image_size"):
        validated(PreprocessConfig, {"side": 32})


def test_a_batch_with_less_than_a_sample_a_worker_says_what_would_do() -> None:
    with pytest.raises(UserError, match=r"global_batch_size is 2, less than the 3 workers; use at most 2"):
        validated(TrainConfig, {"global_batch_size": 2, "num_workers": 3})


def test_values_are_read_as_yaml() -> None:
    assert validated(TrainConfig, dict([parse_assignment("lr=1e-2")])).lr == 0.01  # which YAML 1.1 calls a string
    assert parse_assignment("x=null") == ("x", None)
    assert parse_assignment("x=[1, 2]") == ("x", [1, 2])
    with pytest.raises(UserError, match="takes key=value"):
        parse_assignment("nonsense")


def test_a_switch_needs_no_value() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    add_fields(parser, TrainConfig)

    def given(*words: str) -> object:
        return given_fields(parser.parse_args(["out", *words]), TrainConfig).get("use_gpu")

    assert (given(), given("--use-gpu"), given("--use-gpu", "--lr", "1")) == (None, True, True)
    assert (given("--use-gpu", "false"), given("--use-gpu=true"), given("--use-gpu", "0")) == (False, True, False)


def test_an_input_after_a_switch_is_not_taken_for_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    add_fields(parser, TrainConfig)
    with pytest.raises(SystemExit):
        parser.parse_args(["--use-gpu", "./out"])
    assert "'./out' is neither true nor false; put a switch after the inputs" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    done = command(verb, "--help")
    assert done.returncode == 0
    assert f"python -m jobs.{verb}" in done.stdout
    assert "out" in done.stdout


@pytest.mark.extern
@pytest.mark.parametrize(
    ("module", "remedy"), [("train", "jobs.train"), ("sizes", "jobs.preprocess, or another stage")]
)
def test_the_module_of_a_stage_names_the_command(module: str, remedy: str) -> None:
    for option in (["-m", f"jobs.stages.{module}"], [f"-mjobs.stages.{module}"]):
        done = subprocess.run([sys.executable, *option, "in", "out"], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == f"error: jobs.stages.{module} is not a command; run python -m {remedy}\n"


def test_only_a_reference_takes_published_statistics_for_images() -> None:
    with_file = [verb for verb in VERBS if ".npz" in command(verb, "--help").stdout]
    assert with_file == ["reference"]


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m jobs.preprocess` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "jobs.preprocess", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.extern
def test_a_verb_alone_fails_with_one_message_and_code_2(tmp_path: Path) -> None:
    done = process(str(tmp_path / "none"), str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: the source ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_verb_alone_makes_an_artifact_and_reuses_it(
    digits_folder: Path, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a process with a Ray session of its own it is in test_s3_jobs.py."""
    from jobs.runtime import cluster

    arguments = [str(digits_folder), str(tmp_path / "out"), "--image-size", "32"]
    first = command("preprocess", *arguments)
    assert first.returncode == 0, first.stderr
    assert "digest" in first.stdout
    monkeypatch.setattr(cluster, "connect", lambda *_, **__: pytest.fail("what is reused needs no Ray"))
    again = command("preprocess", *arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert "reused" in again.stderr
    other = command("preprocess", *arguments, "--set", "image_size=16")
    assert other.returncode == 2
    assert "already contains an artifact" in other.stderr


def test_sections_are_frozen() -> None:
    from pydantic import ValidationError

    config: Section = PreprocessConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.image_size = 1  # type: ignore[attr-defined]


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("out", ["images", "images/out", "."])
def test_an_output_among_the_input_is_refused_before_anything_is_written(
    out: str, digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits_folder, tmp_path / "images")
    before = files(tmp_path)
    assert_refused(command("preprocess", "images", out), "overlap; use a separate folder")
    assert files(tmp_path) == before


def test_an_output_inside_another_artifact_is_refused(latents_artifact: object, tmp_path: Path) -> None:
    from edt_core.errors import UserError
    from edt_core.store.folder import Folder
    from jobs.commands.stage import check_place

    inside = Path(latents_artifact.folder.uri) / "a" / "b"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="is inside the artifact"):
        check_place(Folder.at(inside), [])
    check_place(Folder.at(tmp_path / "new"), ["s3://bucket/images", "some/hub-id"])


def test_files_of_others_in_the_output_stay_as_they_are(digits_folder: Path, tmp_path: Path) -> None:
    from edt_core.store.artifact import ArtifactWriter
    from edt_core.store.folder import Folder

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images-00000.tar").write_text("precious")
    out = ArtifactWriter(Folder.at(tmp_path / "out"), "images", "1" * 64)
    with pytest.raises(UserError, match=r"1 files that this run did not write \(images-00000\.tar\)"):
        out.check_own()
    assert (tmp_path / "out" / "images-00000.tar").read_text() == "precious"


def test_an_input_of_the_wrong_kind_is_named(latents_artifact: object, tmp_path: Path) -> None:
    latents = latents_artifact.folder.uri  # type: ignore[attr-defined]
    done = command("encode", latents, str(tmp_path / "out"), "--autoencoder", latents)
    assert_refused(done, "is an artifact of kind latents, but images is needed here")


def test_text_options_are_taken_as_they_are() -> None:
    import argparse

    from edt_core.config import SourceConfig
    from jobs.commands.options import given_fields

    options = argparse.Namespace(classes="010,8", labels="my #1.csv", limit="1_0", kind="labels", path=None)
    given = given_fields(options, SourceConfig)
    assert given == {"classes": "010,8", "labels": "my #1.csv", "limit": 10, "kind": "labels"}
    assert SourceConfig(path="x", **given).classes == ("010", "8")
    assert parse_assignment("source.path=/data/my #1") == ("source.path", "/data/my #1")

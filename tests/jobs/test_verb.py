"""The verbs on their own: `python -m jobs.<verb>`."""

import subprocess
import sys
from pathlib import Path

import pytest

from edt_core.config import PreprocessConfig, Section, TrainConfig, result_fields
from edt_core.errors import UserError
from jobs.verb import parse_assignment, validated

VERBS = ["preprocess", "autoencoder", "encode", "classifier", "reference", "train", "sample", "evaluate"]


def test_what_does_not_change_the_result_is_not_in_the_fields() -> None:
    fields = result_fields(TrainConfig(num_workers=4, checkpoint_every=7))
    assert "lr" in fields
    assert not {"num_workers", "checkpoint_every", "use_gpu", "max_failures", "num_to_keep"} & set(fields)
    assert fields == result_fields(TrainConfig(num_workers=2, checkpoint_every=9))
    assert fields != result_fields(TrainConfig(seed=1))


def test_an_unknown_key_is_named_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown configuration key 'image_sise'.*image_size.*max_bad_fraction"):
        validated(PreprocessConfig, {"image_sise": 32})


def test_a_batch_that_does_not_divide_says_what_would() -> None:
    with pytest.raises(UserError, match=r"global_batch_size 100 does not divide by num_workers 3; use 99 or 102"):
        validated(TrainConfig, {"global_batch_size": 100, "num_workers": 3})


def test_values_are_read_as_yaml() -> None:
    assert validated(TrainConfig, dict([parse_assignment("lr=1e-2")])).lr == 0.01  # which YAML 1.1 calls a string
    assert parse_assignment("x=null") == ("x", None)
    assert parse_assignment("x=[1, 2]") == ("x", [1, 2])
    with pytest.raises(UserError, match="takes key=value"):
        parse_assignment("nonsense")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"jobs.{verb}", "--help"], capture_output=True, text=True, check=True)
    assert f"python -m jobs.{verb}" in done.stdout
    assert "out" in done.stdout


def test_a_verb_alone_fails_with_one_message_and_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.preprocess", str(tmp_path / "none"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the source ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
def test_a_verb_alone_makes_an_artifact_and_reuses_it(digits_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.preprocess", str(digits_folder), str(tmp_path / "out")]
    command += ["--image-size", "32"]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "digest" in first.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "reused" in again.stderr
    other = subprocess.run([*command, "--set", "image_size=16"], capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "already holds an artifact" in other.stderr


def test_sections_are_frozen() -> None:
    from pydantic import ValidationError

    config: Section = PreprocessConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.image_size = 1  # type: ignore[attr-defined]

"""A feature network from elsewhere: damaged weights, odd settings and code in its folder are refused in one message."""

import json
from pathlib import Path

import pytest

from edt_core.errors import UserError
from edt_core.evaluation.extractors.clip import Clip
from tests.attacks.test_weights import DAMAGED, SOME
from tests.support.models import clip_folder

pytest.importorskip("transformers", reason="transformers, the extra [clip], is not installed")
SETTINGS = "preprocessor_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return clip_folder(tmp_path / "clip")


@pytest.mark.parametrize("kind", SOME)
def test_damaged_weights_of_clip_are_refused(kind: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(DAMAGED[kind])
    with pytest.raises(UserError, match=r"is not a valid safetensors file|no CLIP at"):
        Clip.load(folder)


ODD = {
    "empty": "",
    "a zero byte": "\0",
    "a list": "[]",
    "a number": "3",
    "deep lists": "[" * 100_000,
    "deep objects": '{"a":' * 100_000,
    "crop in a list": '{"crop_size": [40]}',
    "crop of lists": '{"crop_size": {"height": [40]}}',
    "crop without end": '{"crop_size": 1e400}',
    "no crop": '{"crop_size": null}',
    "mean of letters": '{"image_mean": "abc"}',
    "mean by name": '{"image_mean": {"a": 1, "b": 2, "c": 3}}',
    "mean without end": '{"image_mean": [1, 2, 1e400]}',
    "no mean": '{"image_mean": null}',
    "std that is no number": '{"image_std": [1, 2, NaN]}',
    "std below 0": '{"image_std": [1, 2, -1]}',
    "one std": '{"image_std": 5}',
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_settings_of_its_preprocessor_are_refused(kind: str, folder: Path) -> None:
    (folder / SETTINGS).write_text(ODD[kind])
    with pytest.raises(UserError, match=SETTINGS):
        Clip.load(folder)


def test_settings_without_end_are_not_read(folder: Path) -> None:
    with (folder / SETTINGS).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=SETTINGS):
        Clip.load(folder)


@pytest.mark.parametrize("size", [10**6, -8, 0, "forty", None, 1e400])
def test_a_size_that_its_weights_do_not_have_takes_no_memory(size: object, folder: Path) -> None:
    """Positions of a million pixels would be 2 TB."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_size": size}))
    with pytest.raises(UserError, match="no CLIP at"):
        Clip.load(folder)


def test_code_in_the_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoImageProcessor": "evil.Model"}
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    (folder / SETTINGS).write_text(json.dumps({"auto_map": code}))
    assert Clip.load(folder).preprocess.side == 40
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": code, "model_type": "evil"}))
    with pytest.raises(UserError, match="no CLIP at"):
        Clip.load(folder)
    assert not ran.exists()

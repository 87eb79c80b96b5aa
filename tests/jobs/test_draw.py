"""`edt sample`: a picture of chosen classes, the same for the same seed."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edt_core.models import EDT
from edt_core.store.folder import Folder
from jobs.commands import draw
from jobs.commands.draw import main
from jobs.models.open import open_model
from tests.support.models import made_model, pipeline_folder
from tests.support.small import edt

FAST = ["--num-sampling-steps", "2"]
SIDE, GAP = 64, 4  # of an image of 32 pixels in the picture, and between two


def drawn(model: object, out: Path, *options: str) -> bytes:
    main([str(model), "--out", str(out), *FAST, *options])
    return out.read_bytes()


def cells(picture: bytes, rows: int, columns: int) -> np.ndarray:
    """The images of a picture, [rows, columns, S, S, 3]."""
    pixels = np.asarray(Image.open(io.BytesIO(picture)))
    grid = pixels[GAP : GAP + rows * (SIDE + GAP), -columns * (SIDE + GAP) :]
    return grid.reshape(rows, SIDE + GAP, columns, SIDE + GAP, 3).swapaxes(1, 2)[:, :, :SIDE, :SIDE]


def test_an_image_is_a_function_of_seed_place_and_class(folder: Path, tmp_path: Path) -> None:
    many = drawn(folder, tmp_path / "a.png", "--classes", "class 3,1,0", "--num", "3", "--seed", "5")
    assert drawn(folder, tmp_path / "b.png", "--classes", "class 3,1,0", "--num", "3", "--seed", "5") == many
    whole = cells(many, 3, 3)
    few = cells(drawn(folder, tmp_path / "c.png", "--classes", "0,3", "--num", "2", "--seed", "5"), 2, 2)
    assert np.array_equal(few, whole[[2, 0], :2])  # to the last bit, whatever else is drawn
    other = cells(drawn(folder, tmp_path / "d.png", "--classes", "0,3", "--num", "2", "--seed", "6"), 2, 2)
    assert not np.array_equal(other, few)
    assert len(np.unique(whole.reshape(9, -1), axis=0)) == 9


def test_batches_that_are_filled_up_give_the_first_of_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(draw._AT_ONCE, "cpu", 4)
    five = cells(drawn(folder, tmp_path / "a.png", "--classes", "2,1", "--num", "5"), 2, 5)
    three = cells(drawn(folder, tmp_path / "b.png", "--classes", "1", "--num", "3"), 1, 3)
    assert np.array_equal(five[1, :3], three[0])


def test_options_are_those_the_model_was_evaluated_with_unless_given(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("transformer", "vae", "scheduler"):
        (kept / name).symlink_to(folder / name)
    index["protocol"] |= {"sampler": "ddim", "num_sampling_steps": 2, "cfg_scale": 3.0, "amm_blocks": [1]}
    (kept / "model_index.json").write_text(json.dumps(index))
    main([str(kept), "--out", str(tmp_path / "a.png"), "--num", "1"])
    told = capsys.readouterr().out
    assert "4 x 1 images of EDT-Tiny/2 (class 0, class 1, class 2, class 3)" in told
    assert "seed 0, ddim, 2 steps, cfg_scale 3, AMM [1], fp32, cpu" in told
    main([str(kept), "--out", str(tmp_path / "b.png"), "--num", "1", "--cfg-scale", "1", "--amm-blocks", "[]"])
    assert "cfg_scale 1, AMM off" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_every_kind_of_model_gives_one_picture(model: EDT, folder: Path, tmp_path: Path) -> None:
    made = open_model(str(folder), Folder.at(tmp_path / "work"))
    assert made.autoencoder is not None
    torch.save(model.state_dict(), tmp_path / "a.pt")
    first = drawn(folder, tmp_path / "a.png", "--classes", "2", "--num", "1")
    autoencoders = (str(folder / "vae"), made.autoencoder.folder.uri)
    for location, autoencoder in zip((tmp_path / "a.pt", made.checkpoint.folder.uri), autoencoders, strict=True):
        picture = drawn(location, tmp_path / "b.png", "--classes", "2", "--num", "1", "--autoencoder", autoencoder)
        assert np.array_equal(cells(picture, 1, 1), cells(first, 1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "clas 2"], r"no class is called 'clas 2'; did you mean 2 \(class 2\)"),
        (["--classes", "class"], r"class 'class' may be 0 \(class 0\) or 1 "),
        (["--classes", "4"], r"class 4 does not exist; the model has 0\.\.3"),
        (["--classes", ",".join("0" * 21)], "21 classes do not fit the 20 rows"),
        (["--out", "grid.jpg"], r"--out grid.jpg does not name a PNG file; use a name that ends in \.png"),
        (["--out", "/dev/null/grid.png"], "cannot write to /dev/null"),
        (["--cfg-scale", "0.5"], "'cfg_scale': Input should be greater than or equal to 1"),
        (["--amm-blocks", "77"], "77"),
        (["--num-sampling-steps", "2000"], "takes 2 to 1000 steps"),
        (["--autoencoder", "/nowhere"], "no autoencoder at /nowhere"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([str(folder), *FAST, *options])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_autoencoders_that_are_not_known_or_do_not_fit(
    model: EDT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(model.state_dict(), tmp_path / "a.pt")
    other = pipeline_folder(tmp_path / "other", made_model(image_size=64, factor=8), factor=8)
    for options, message in (
        ([], "does not state its autoencoder; pass --autoencoder"),
        (["--autoencoder", str(other / "vae")], "the autoencoder has factor 8 and 4 latent channels, but EDT-Tiny/2"),
    ):
        with pytest.raises(SystemExit):
            main([str(tmp_path / "a.pt"), "--out", str(tmp_path / "a.png"), *FAST, *options])
        assert message in capsys.readouterr().err


def test_it_starts_no_ray_session(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("a Ray session was started"))
    done = edt("sample", str(folder), "--num", "1", "--classes", "0", "--out", str(tmp_path / "a.png"), *FAST)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.png").exists()

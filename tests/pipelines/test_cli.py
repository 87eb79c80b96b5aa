"""The command line: mistakes are one message and exit code 2, without a traceback and without debris."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.small import edt

TABLE = ["--set", "train.attention_table=/nowhere/table.json"]
NO_TABLE = "the attention table /nowhere/table.json (train.attention_table) cannot be read"


def folder_with(root: Path, *names: str) -> Path:
    root.mkdir(exist_ok=True)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def from_folder(path: Path) -> list[str]:
    fields = ("source.kind=image_folder", f"source.path={path}", "classifier.feature_dim=16")  # for 32 images
    return [part for field in fields for part in ("--set", field)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "no images in"),
        (("a/notes.txt",), "no images in"),
        (("a/1.png", "a/2.png"), "only one class"),
    ],
)
def test_folders_that_cannot_be_used(files: tuple[str, ...], message: str, tmp_path: Path) -> None:
    images = folder_with(tmp_path / "images", *files)
    done = edt("run", "--store", str(tmp_path / "store"), *from_folder(images))
    assert_user_error(done, message)
    assert not list((tmp_path / "store").rglob("manifest.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quickstart", "--set", "train.max_step=5"], "unknown configuration key 'train.max_step'"),
        (["run", "quickstart", "--set", "preprocess.image_size=36"], "multiple of 32"),
        (["run", "quickstart", "--set", "train.global_batch_size=1"], "less than the 2 workers"),
        (["run", "quickstart", "--dry-run", "--set", "source.kind=image_folder"], "source.path is missing"),
        (["run", "quickstart", "--dry-run", *TABLE], NO_TABLE),
        (["run", "no-such-config"], "no configuration 'no-such-config'"),
        (["run", "quickstart", "--store", "/dev/null/store"], "cannot write to /dev/null/store"),
        (["verify", "/nowhere"], "is not an artifact"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = edt(*arguments, cwd=tmp_path)
    assert_user_error(done, message)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_attention_table_ends_a_run_before_its_first_step(tmp_path: Path) -> None:
    done = edt("run", "quickstart", "--store", str(tmp_path / "store"), *TABLE, cwd=tmp_path)
    assert_user_error(done, NO_TABLE)
    assert not list((tmp_path / "store").rglob("manifest.json"))


def test_verify_tells_whole_from_damaged(tmp_path: Path) -> None:
    from edt_core.store.artifact import ArtifactWriter
    from edt_core.store.folder import Folder

    out = ArtifactWriter(Folder.at(tmp_path), "images", "0" * 64)
    out.write_bytes("a.bin", b"abc")
    out.commit({}, {}, {})
    assert "1 files, 3 bytes" in edt("verify", str(tmp_path)).stdout
    (tmp_path / "a.bin").write_bytes(b"abd")
    assert edt("verify", str(tmp_path)).returncode == 0
    assert_user_error(edt("verify", str(tmp_path), "--deep"), "another sha256")


def test_unreadable_images_are_listed_with_exit_code_2(digits_folder: Path, tmp_path: Path, here: None) -> None:
    import shutil

    from edt_core.store.folder import Folder
    from pipelines.tracking.catalog import Catalog
    from pipelines.tracking.runs import run_rows

    shutil.copytree(digits_folder, tmp_path / "images")
    for path in sorted((tmp_path / "images").glob("*/*.png"))[:5]:
        path.write_bytes(b"nothing")
    done = edt("run", "--store", str(tmp_path / "store"), *from_folder(tmp_path / "images"))
    assert done.returncode == 2, done.stderr
    assert "5 of 32 images (15.62%) could not be read" in done.stdout
    assert len([line for line in done.stdout.splitlines() if ".png: Unidentified" in line]) == 5
    assert "Traceback" not in done.stdout + done.stderr
    assert not list((tmp_path / "store").rglob("manifest.json"))
    (row,) = run_rows(Catalog.existing(Folder.at(tmp_path / "store")), None, 2)
    assert row["status"] == "FAILED"
    assert "5 of 32 images" in row["failed"]


def test_a_dry_run_tells_what_it_would_take_and_does_nothing(digits_folder: Path, tmp_path: Path) -> None:
    done = edt("run", "--dry-run", "--store", str(tmp_path / "store"), *from_folder(digits_folder), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in (
        r"edt-tiny-digits-32: EDT-Tiny/2, 32 px, 4 classes",
        r"parameters +\d",
        r"images +32$",
        r"steps +500",
    ):
        assert re.search(line, done.stdout, re.MULTILINE), (line, done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_every_imagenet_configuration_of_edt_has_the_paper_s_recipe() -> None:
    from pipelines.config.schema import config_names, load_config

    names = [name for name in config_names() if name.startswith("imagenet") and "-edt-" in name]
    assert names == ["imagenet256-edt-b", "imagenet256-edt-s", "imagenet256-edt-xl", "imagenet512-edt-s"]
    for name in names:
        config = load_config(name)
        (model,) = config.models
        train = config.train_of(model)
        assert (train.global_batch_size, train.max_steps, train.optimizer) == (256, 400_000, "adan")
        assert (train.lr, train.lr_final) == (5e-4 if "-xl" in name else 1e-3, 5e-5)
        assert (train.lr_schedule, train.warmup_steps, train.max_grad_norm) == ("linear", 0, None)
        assert (train.ema_decay, train.weight_decay, train.class_dropout_prob) == (0.9999, 0, 0.1)
        assert (train.num_timesteps, train.min_snr_gamma, train.masked_loss) == (1000, 5, True)
        assert train.timestep_sampler == "loss-second-moment"
        assert config.preprocess.image_size == int(name[len("imagenet") : len("imagenet") + 3])
        assert model.endswith(f"-{config.preprocess.image_size}")


def assert_user_error(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr + done.stdout

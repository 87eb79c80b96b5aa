"""edt init: what it writes is a configuration that runs, by flags and by questions; rubbish is refused at once."""

import os
import pty
import shutil
import subprocess
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from edt_core.config import TrainConfig
from edt_core.errors import UserError
from edt_core.evaluation.published import AUTOENCODER
from pipelines.cli import app
from pipelines.config.schema import load_config
from pipelines.setup.autoencoder_facts import published_facts
from pipelines.setup.hardware import Hardware
from pipelines.setup.init import (
    Answers,
    Images,
    check_autoencoder,
    check_model,
    check_name,
    check_size,
    config_text,
    latents_of,
    look_at,
    notes,
    parse_hardware,
    suggested_autoencoder,
    suggested_model,
    suggested_name,
    suggested_size,
)
from tests.support.pages import ROOT, blocks
from tests.support.small import EDT, environment

LAPTOP = Hardware(cpus=2, memory=16 << 30)
SERVER = Hardware(cpus=64, memory=512 << 30, gpus=("H100",) * 8, gpu_memory=80 << 30, bf16=True)
SMALL_GPU = Hardware(cpus=8, memory=32 << 30, gpus=("RTX",), gpu_memory=8 << 30)


def init(*arguments: str) -> str:
    """What `edt init` says in this process, or the user error that it ends with."""
    result = CliRunner().invoke(app, ["init", *arguments])
    assert result.exception is None or isinstance(result.exception, UserError), result.exception
    return result.output if result.exception is None else f"error: {result.exception}"


def images(number: int, side: int = 256, path: str = "/data/flowers") -> Images:
    return Images(path, "image_folder", number, 10, (side,) * 5)


def written(answers: Answers, machine: Hardware, folder: Path) -> Path:
    path = folder / "mine.yaml"
    path.write_text(config_text(answers, machine, path.name))
    return path


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate of memory that grows with the samples: tracing a model of this size takes seconds."""

    def estimate(train: TrainConfig, *arguments: object) -> SimpleNamespace:
        return SimpleNamespace(memory=train.micro_batch() << 31)

    monkeypatch.setattr("edt_core.training.estimate.estimate", estimate)


def test_every_answer_makes_a_configuration_that_loads(estimated: None, tmp_path: Path) -> None:
    sizes, names = (32, 64, 96, 256, 288, 512), ("EDT-Tiny/2", "EDT-XL/2", "DiT-B/4", "MDTv2-S/2")
    for size, model, gpus in product(sizes, names, (0, 1, 8)):
        machine = SERVER if gpus else LAPTOP
        path = written(Answers(images(8000), "mine", size, gpus, model), machine, tmp_path)
        config = load_config(str(path))
        (name,) = config.models
        train = config.train_of(name)
        assert (train.model, train.use_gpu, train.worker_range[1]) == (model, gpus > 0, gpus or 2)
        assert config.preprocess.image_size == size
        assert config.model_of(name, 10).latent_size == size // config.autoencoder.downsample_factor
        assert train.precision == ("bf16" if gpus else "fp32")
        # 2 GiB a sample: 32 of them are what 80 % of a GPU of 80 GiB has room for.
        assert train.micro_batch_size == {0: None, 1: 32, 8: None}[gpus]


def test_a_path_is_read_back_as_it_was(estimated: None, tmp_path: Path) -> None:
    for name in ("a b: c #d", 'it\'s "quoted"', "ünïcode", "- 1", "null", "{x}", "x" * 200):
        answers = Answers(images(5000, path=f"/data/{name}"), "mine", 256, 1, "EDT-S/2", name, f"/w/{name}.pth")
        config = load_config(str(written(answers, SERVER, tmp_path)))
        assert config.source.path == f"/data/{name}"
        assert (config.autoencoder.pretrained, config.network("inception").weights) == (name, f"/w/{name}.pth")
        assert (config.extractors, config.promote.metric) == (("inception",), "fid")


def test_a_small_gpu_takes_its_share_in_parts(tmp_path: Path) -> None:
    def micro(machine: Hardware) -> int | None:
        answers = Answers(images(100_000), "mine", 256, 1, "EDT-B/2", "stabilityai/sd-vae-ft-ema")
        return load_config(str(written(answers, machine, tmp_path))).train.micro_batch_size

    small, large = micro(SMALL_GPU), micro(SERVER)
    assert small is not None
    assert small < (large or 256)


def test_what_is_suggested_follows_images_and_hardware() -> None:
    assert [suggested_size(images(9, side), 0) for side in (8, 32, 70, 500)] == [32, 32, 64, 64]
    assert [suggested_size(images(9, side), 1) for side in (8, 140, 255, 256, 5000)] == [32, 128, 128, 256, 512]
    assert suggested_model(images(10**6), 0) == "EDT-Tiny/2"
    found = [suggested_model(images(number), gpus) for number, gpus in ((10**6, 8), (10**6, 1), (10**5, 8), (9, 8))]
    assert found == ["EDT-XL/2", "EDT-S/2", "EDT-B/2", "EDT-S/2"]
    assert [suggested_autoencoder(*given) for given in ((256, 1), (64, 1), (256, 0))][1:] == ["fit", "fit"]
    assert [suggested_name(p) for p in ("/data/My Flowers/train", "s3://b/x.tar", "/")] == ["my-flowers", "x", "mine"]


@pytest.mark.parametrize(
    ("check", "text", "message"),
    [
        (parse_hardware, "tpu", "cpu, gpu"),
        (parse_hardware, "gpu-0", "cpu, gpu"),
        (check_size, "33", "multiple of 32"),
        (check_size, "-32", "multiple of 32"),
        (check_size, "", "multiple of 32"),
        (check_model, "EDT-Q", r"Unknown model 'EDT-Q'.*EDT-S/2"),
        (check_name, "a/b", "letters, digits"),
        (check_name, "", "letters, digits"),
        (look_at, " ", "the path is empty"),
        (look_at, "/nowhere/at/all", "does not exist"),
    ],
)
def test_wrong_answers_are_told_what_is_right(check: object, text: str, message: str) -> None:
    assert callable(check)
    with pytest.raises(UserError, match=message):
        check(text)


def test_an_autoencoder_whose_latents_do_not_fit_is_refused_when_it_is_named() -> None:
    with pytest.raises(UserError, match=r"EDT-Tiny/2 does not fit.*'fit'"):
        check_autoencoder("stabilityai/sd-vae-ft-ema", 32, "EDT-Tiny/2")
    assert check_autoencoder("fit", 32, "EDT-Tiny/2") is None


def test_a_folders_own_factor_and_channels_are_written(
    estimated: None, tmp_path: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKL

    folder, levels = tmp_path / "kl16", 5
    AutoencoderKL(
        latent_channels=16,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8,
        shift_factor=0.1,
    ).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    given = ("--images", str(digits_folder), "--hardware", "cpu", "--yes", "--autoencoder", str(folder))
    assert "EDT-Tiny/2 does not fit" in init(*given, "--image-size", "64")  # 4 x 4 latents
    output = init(*given, "--image-size", "128")
    assert "are assumed" not in output
    section = load_config("edt.yaml").autoencoder
    assert (section.downsample_factor, section.latent_channels) == (16, 16)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"contains no \.safetensors"):
        published_facts(str(folder))


def test_a_hub_id_that_cannot_be_read_is_assumed_to_be_as_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    answers = Answers(images(5000), "a", 256, 1, "EDT-S/2", "somebody/no-such-autoencoder")
    assert latents_of(answers.autoencoder, 256) == (8, 4)
    (remark,) = notes(answers, SERVER)
    assert "factor 8 and 4 channels are assumed" in remark
    assert notes(Answers(images(5000), "a", 256, 1, "EDT-S/2", AUTOENCODER), SERVER) == []


def test_doubts_are_said() -> None:
    told = " ".join(notes(Answers(images(50, 100), "a", 256, 4, "EDT-S/2"), LAPTOP))
    assert all(word in told for word in ("are few", "enlarged", "0 GPUs of the 4"))
    assert "weeks" in " ".join(notes(Answers(images(5000), "a", 256, 0, "EDT-XL/2"), LAPTOP))
    assert notes(Answers(images(5000), "a", 32, 0, "EDT-Tiny/2"), LAPTOP) == []


def test_by_flags_a_dry_run_and_a_plan_of_the_file_work(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.plan import plan
    from pipelines.setup.dry_run import training_needs

    monkeypatch.chdir(tmp_path)
    told = init("--images", str(digits_folder), "--hardware", "cpu", "--yes")
    assert "32 images of 4 classes (image_folder), about 8 px" in told
    assert "edt doctor edt.yaml" in told
    assert [path.name for path in tmp_path.iterdir()] == ["edt.yaml"]
    config = load_config("edt.yaml")
    assert "EDT-Tiny/2, 32 px, 4 classes" in training_needs(config)
    assert {step.action for step in plan(config)} == {"run"}
    assert len([line for line in Path("edt.yaml").read_text().splitlines() if "#" in line]) > 10


def test_broken_and_turned_photos_are_found_and_the_file_turns_them(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    folder, exif = tmp_path / "photos", Image.Exif()
    shutil.copytree(digits_folder, folder)
    exif[0x0112] = 6
    Image.new("RGB", (40, 30), "red").save(folder / "0" / "phone.jpg", exif=exif)
    (folder / "1" / "broken.jpg").write_bytes((folder / "0" / "phone.jpg").read_bytes()[:400])
    monkeypatch.chdir(tmp_path)
    given = ("--images", str(folder), "--hardware", "cpu", "--yes")
    told = init(*given)
    assert "all 34 images inspected" in told
    assert "1 of 34 images cannot be read (1/broken.jpg" in told
    assert "leaves out at most 1" in told
    assert "1 of 34 photos have an EXIF orientation: rotate_by_exif is true in the file" in told
    assert load_config("edt.yaml").preprocess.rotate_by_exif
    (folder / "1" / "broken-2.jpg").write_bytes(b"")
    told = init(*given, "--force")
    assert "a run stops at more than 1" in told
    assert "--set preprocess.max_bad_fraction=0.06" in told


def test_upright_photos_are_left_as_they_are(digits_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    told = init("--images", str(digits_folder), "--hardware", "cpu", "--yes", "--out", str(out))
    assert "EXIF" not in told
    assert "rotate_by_exif" not in out.read_text()


def test_the_next_commands_are_quoted_for_a_shell(digits_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "my $first #1.yaml"
    told = init("--images", str(digits_folder), "--hardware", "cpu", "--yes", "--out", str(out))
    for command in ("edt doctor", "edt plan", "edt run"):
        assert f"{command} '{out}'" in told
    assert f"edt config show '{out.name}'" in out.read_text()
    load_config(str(out))


def test_a_file_is_written_over_only_when_it_is_asked_for(digits_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("kept")
    given = ("--images", str(digits_folder), "--hardware", "cpu", "--yes", "--out", str(out))
    assert "already exists" in init(*given)
    assert out.read_text() == "kept"
    assert "wrote" in init(*given, "--force")
    assert yaml.safe_load(out.read_text())["source"]["path"] == str(digits_folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--yes",), "--images is missing"),
        (("--images", "{digits}"), "--hardware is missing.*--yes for the suggestion"),
        (("--images", "{digits}", "--yes", "--out", "mine.txt"), "must end with .yaml"),
        (("--images", "{digits}", "--yes", "--out", "/dev/null/mine.yaml"), "cannot write|already exists"),
        (("--images", "{digits}", "--yes", "--inception-weights", "nothing.pth"), "is no file"),
    ],
)
def test_nothing_is_written_of_a_wrong_request(
    arguments: tuple[str, ...], message: str, digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    assert re.search(message, init(*(text.format(digits=digits_folder) for text in arguments)))
    assert list(tmp_path.iterdir()) == []


def test_images_without_labels_are_refused_with_a_way_that_works(digits_folder: Path, tmp_path: Path) -> None:
    """A model needs two classes: two arbitrary halves are some, by the program of docs/data.md."""
    flat = tmp_path / "photos"
    flat.mkdir()
    for number, path in enumerate(sorted(digits_folder.glob("*/*"))):
        shutil.copy(path, flat / f"{number}{path.suffix}")
    out = str(tmp_path / "edt.yaml")
    refusal = init("--images", str(flat), "--yes", "--out", out)
    assert "and nothing states their classes" in refusal
    assert "docs/data.md, Images without labels" in refusal
    page = [block for block in blocks(ROOT / "docs" / "data.md") if block.language == "python"]
    (program,) = ("\n".join(block.lines) for block in page if "labels.csv" in "\n".join(block.lines))
    exec(program.replace("/data/photos", str(flat)), {})
    said = init("--images", str(flat), "--yes", "--out", out)
    assert f"{number + 1} images of 2 classes (labels)" in said
    assert load_config(out).source.kind == "labels"


@pytest.mark.extern
def test_on_a_terminal_it_asks_and_asks_again(digits_folder: Path, tmp_path: Path) -> None:
    """Answers are typed ahead: the first folder is none, and a size does not divide; the rest is taken as suggested."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*EDT, "init"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=tmp_path,
        env=environment(CUDA_VISIBLE_DEVICES=""),
    )
    os.close(theirs)
    answers = ("/nowhere", str(digits_folder), "cpu", "33", "64", "", "", "typed")
    os.write(ours, "".join(f"{answer}\n" for answer in answers).encode())
    told = b""
    try:
        while part := os.read(ours, 4096):
            told += part
    except OSError:  # how Linux tells that the other side is closed
        pass
    os.close(ours)
    assert process.wait() == 0, told.decode()
    assert b"does not exist" in told
    assert b"The models are: EDT-" in told
    assert b"multiple of 32" in told
    config = load_config(str(tmp_path / "edt.yaml"))
    assert (config.name, config.preprocess.image_size, config.train.model) == ("typed", 64, "EDT-Tiny/2")

"""Safetensors files that a stranger made, through every command that reads weights: one message, exit code 2."""

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edt_core.errors import UserError
from edt_core.files.tensor_files import MAX_HEADER_BYTES, check_header, load_tensors
from tests.support.small import edt

_HUGE = MAX_HEADER_BYTES + 1


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _tensor(offsets: list[int], dtype: str = "F32", shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": offsets}


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "no header": b"\0" * 8,
    "a header of 2^64 bytes": file_of({}, length=(1 << 64) - 1),
    "a header beyond the file": file_of({}, length=1000),
    "100 MB of spaces": file_of(b"{" + b" " * 100_000_000 + b"}"),
    "a header that is a list": file_of([]),
    "a header without end": file_of(b"{" + b'"a":{' * 100_000),
    "a header that is no UTF-8": file_of(b'{"\xff": 1}'),
    "an offset beyond the file": file_of({"a": _tensor([0, 4_000_000_000], shape=[1_000_000_000])}, bytes(4)),
    "a negative offset": file_of({"a": _tensor([-4, 0])}, bytes(4)),
    "offsets the wrong way round": file_of({"a": _tensor([4, 0])}, bytes(4)),
    "offsets that overlap": file_of({"a": _tensor([0, 4]), "b": _tensor([0, 4])}, bytes(4)),
    "a gap": file_of({"a": _tensor([4, 8])}, bytes(8)),
    "bytes after the end": file_of({"a": _tensor([0, 4])}, bytes(400)),
    "an unknown dtype": file_of({"a": _tensor([0, 4], "X99")}, bytes(4)),
    "a shape of another size": file_of({"a": _tensor([0, 4], shape=[2])}, bytes(4)),
    "a shape that overflows": file_of({"a": _tensor([0, 4], shape=[1 << 62, 1 << 62])}, bytes(4)),
    "a negative shape": file_of({"a": _tensor([0, 4], shape=[-1])}, bytes(4)),
}


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("framework", ["pt", "numpy"])
def test_a_damaged_file_is_one_message(data: bytes, framework: str, tmp_path: Path, peak: Callable[[], int]) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    tracemalloc.reset_peak()
    before = peak()
    with pytest.raises(UserError, match="is not a valid safetensors file") as raised:
        load_tensors(path, framework)  # type: ignore[arg-type]
    assert len(str(raised.value)) < 600 + len(str(path))
    assert peak() - before < 8 << 20


def test_a_file_that_is_a_fifo_or_a_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(UserError, match="but a regular file is expected"):
            check_header(tmp_path / name)


def test_what_is_whole_is_read(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(file_of({"a": _tensor([0, 4])}, bytes(4)))
    assert load_tensors(path)["a"].tolist() == [0.0]
    assert load_tensors(path, "numpy")["a"].tolist() == [0.0]


SOME = ("empty", "a header of 2^64 bytes", "100 MB of spaces", "offsets that overlap", "an unknown dtype")


@pytest.mark.parametrize("kind", SOME)
def test_every_command_that_takes_a_file_or_a_folder_of_weights(kind: str, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").write_bytes(DAMAGED[kind])
    (tmp_path / "dino").mkdir()
    (tmp_path / "dino/config.json").write_text(json.dumps({"model_type": "dinov2"}))
    (tmp_path / "dino/model.safetensors").write_bytes(DAMAGED[kind])
    (tmp_path / "w.safetensors").write_bytes(DAMAGED[kind])
    for arguments in (
        ("import", "w.safetensors", "--name", "m"),
        ("sample", "w.safetensors", "--out", "o.png", "--classes", "0"),
        ("export", "w.safetensors", "o.pt2"),
    ):
        done = edt(*arguments, cwd=tmp_path)
        assert done.returncode == 2, (arguments, done.stderr)
        assert "bug in this program" not in done.stderr
    from edt_core.autoencoders.autoencoder import load_autoencoder
    from edt_core.evaluation.extractors import load_extractor

    with pytest.raises(UserError, match="is not a valid safetensors file"):
        load_autoencoder(tmp_path / "vae")
    with pytest.raises(UserError, match=r"is not a valid safetensors file|no DINOv2|needs transformers"):
        load_extractor("dinov2", tmp_path / "dino")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{}", '{"num_classes": 1e400}', "\0", ""])
def test_a_classifier_of_odd_json_is_refused(text: str, tmp_path: Path) -> None:
    from edt_core.evaluation.extractors import load_extractor

    (tmp_path / "classifier.json").write_text(text)
    (tmp_path / "classifier.safetensors").write_bytes(file_of({"a": _tensor([0, 4])}, bytes(4)))
    with pytest.raises(UserError, match="no classifier at"):
        load_extractor("classifier", tmp_path)


@pytest.mark.parametrize("kind", SOME)
def test_the_weights_of_an_own_checkpoint(kind: str, tmp_path: Path) -> None:
    from edt_core.models import model_config
    from edt_core.store.layout import EMA_WEIGHTS, MODEL_CONFIG
    from edt_core.training.checkpoint import ema_model

    config = model_config("EDT-Tiny/2", 32, 4)
    (tmp_path / MODEL_CONFIG).write_text(json.dumps(config.to_dict()))
    (tmp_path / EMA_WEIGHTS).write_bytes(DAMAGED[kind])
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        ema_model(tmp_path)
    (tmp_path / EMA_WEIGHTS).write_bytes(file_of({"a": _tensor([0, 4])}, bytes(4)))
    with pytest.raises(UserError, match="does not contain the weights of its model"):
        ema_model(tmp_path)
    shutil.rmtree(tmp_path)

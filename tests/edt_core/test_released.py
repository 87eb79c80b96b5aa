"""Checkpoints of the authors' training code."""

import argparse
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from edt_core.errors import UserError
from edt_core.models import (
    EDT,
    DiT,
    build_model,
    create_model,
    load_released,
    model_config,
    read_released_model,
    shadow,
)
from tests.support.cases import suite_of

MANIFEST = json.loads((Path(__file__).parents[1] / "golden" / "edt_manifest.json").read_text())
TINY = ("EDT-Tiny/2", 64, 7)


@pytest.fixture(scope="module")
def tiny() -> EDT:
    model = create_model(*TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return model


def same(a: EDT, b: EDT) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def published(ema: dict[str, Tensor], last: dict[str, Tensor] | None = None, **options: Any) -> dict[str, Any]:
    """A checkpoint as the authors' training writes it."""
    optimizer = {"state": {0: {"exp_avg": torch.ones(2), "step": 3}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    args = argparse.Namespace(results_dir="results", **options)
    return {"model": last or ema, "ema": ema, "opt": optimizer, "args": args}


def test_a_published_file_gives_the_weights_asked_for(tiny: EDT, tmp_path: Path) -> None:
    ema = tiny.state_dict()
    trained = {key: value + 1 for key, value in ema.items()}
    path = save(tmp_path / "a.pt", published(ema, trained, num_classes=7))
    loaded = load_released(path)
    assert loaded.config == tiny.config
    assert same(loaded, tiny)
    assert not loaded.training
    assert torch.equal(load_released(str(path), "model").pos_embed, tiny.pos_embed + 1)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {f"module.{k}": v for k, v in s.items()}], ids=["bare", "ddp"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_bare_state_dict(tiny: EDT, tmp_path: Path, wrap: Any, zipped: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save(wrap(tiny.state_dict()), path, _use_new_zipfile_serialization=zipped)
    assert same(load_released(path), tiny)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(tiny: EDT, tmp_path: Path, dtype: torch.dtype) -> None:
    other = {key: value.to(dtype) for key, value in tiny.state_dict().items()}
    loaded = load_released(save(tmp_path / "a.bin", other))
    assert loaded.pos_embed.dtype == torch.float32
    assert torch.equal(loaded.pos_embed, other["pos_embed"].float())


def test_indices_in_half_precision_are_those_of_the_model(tmp_path: Path) -> None:
    model = create_model("MDTv2-Tiny/2", 32, 4)
    half = {key: value.half() for key, value in model.state_dict().items()}
    key = "de_blocks.0.attn.rel_pos_bias.relative_position_index"
    assert torch.equal(load_released(save(tmp_path / "a.pt", half)).state_dict()[key], model.state_dict()[key])


@pytest.mark.parametrize("image_size", [256, 512])
def test_the_published_keys_are_those_of_a_named_model(image_size: int, tmp_path: Path) -> None:
    """Tensors of one number each on disk, in the published shapes."""
    keys = MANIFEST[f"EDT-S/2@{image_size}"]["keys"]
    state = {key: torch.full((1,), 0.5).expand(shape) for key, shape in keys.items()}
    path = save(tmp_path / "a.pt", published(state, model="EDT-S/2", image_size=image_size))
    loaded = load_released(path)
    assert (loaded.config.name, loaded.config.image_size, loaded.config.num_classes) == ("EDT-S/2", image_size, 1000)
    assert all(bool((value == 0.5).all()) for value in loaded.state_dict().values())


RELEASED = [("DiT-S/8", 256), ("DiT-S/2", 512), ("DiT-S/4", 256), ("MDTv2-S/2", 256)]


def released(name: str, image_size: int) -> dict[str, Tensor]:
    """A state dict in the shapes of a model, which `test_models_zoo.py` compares with the published ones."""
    state = shadow(model_config(name, image_size)).state_dict()
    real = create_model(name, image_size).state_dict() if name.startswith("MDTv2") else {}
    pairs = {key: value for key, value in real.items() if key.endswith("relative_position_index")}
    return {key: torch.full((1,), 0.5).expand(value.shape) for key, value in state.items()} | pairs


@pytest.mark.parametrize(("name", "image_size"), suite_of(RELEASED[1::2], RELEASED))
def test_bare_state_dicts_of_dit_and_mdt_are_told_apart(name: str, image_size: int, tmp_path: Path) -> None:
    loaded = load_released(save(tmp_path / "a.pt", released(name, image_size)))
    assert loaded.config == model_config(name, image_size)
    assert bool((loaded.x_embedder.proj.weight == 0.5).all())


def test_an_mdt_has_the_decoder_that_its_keys_say(tmp_path: Path) -> None:
    config = replace(model_config("MDTv2-Tiny/2", 32, 4), decode_depth=4)
    state = build_model(config).state_dict()
    assert load_released(save(tmp_path / "a.pt", state)).config == config


def test_an_mdt_with_other_pairs_of_tokens_is_refused(tmp_path: Path) -> None:
    state = create_model("MDTv2-Tiny/2", 32, 4).state_dict()
    key = "de_blocks.1.attn.rel_pos_bias.relative_position_index"
    with pytest.raises(UserError, match=f"'{key}' has other pairs of tokens than MDTv2-Tiny/2"):
        load_released(save(tmp_path / "a.pt", {**state, key: state[key].flip(0)}))


@pytest.mark.parametrize("name", suite_of(["MDTv2-Tiny/2"], ["DiT-Tiny/2", "MDTv2-Tiny/2"]))
def test_the_closest_of_all_architectures_is_named(name: str, tmp_path: Path) -> None:
    state = create_model(name, 32, 4).state_dict()
    del state["final_layer.linear.bias"]
    message = rf"closest is {name} at 32 pixels with 4 classes, but 'final_layer.linear.bias' is missing"
    with pytest.raises(UserError, match=message):
        load_released(save(tmp_path / "a.pt", state))


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["torch", "pickle", "beside weights", "in args"])
def test_code_in_a_file_is_refused_and_not_run(tiny: EDT, tmp_path: Path, how: str) -> None:
    path, mark = tmp_path / "a.pt", tmp_path / "was-run"
    code = Malicious(mark)
    if how == "pickle":
        path.write_bytes(pickle.dumps({"model": code}, protocol=2))
    else:
        state = tiny.state_dict()
        content = {"torch": code, "beside weights": {"ema": state, "opt": code}, "in args": published(state, code=code)}
        torch.save(content[how], path)
    with pytest.raises(UserError) as refused:
        load_released(path)
    assert not mark.exists()
    assert str(path) in str(refused.value)
    assert "needs code to be run" in str(refused.value)
    assert "weights_only" not in str(refused.value)  # PyTorch's own message advises to run it
    assert "safe_globals" not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a checkpoint at all",
        b"<!DOCTYPE html><p>Sign in",
        b"PK\x03\x04 broken",
        b"\x80\x02}q\x00.",
        pickle.dumps([1, 2], 2),
    ],
)
def test_what_is_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.pt is not a checkpoint"):
        load_released(path)


def test_a_truncated_file(tiny: EDT, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", tiny.state_dict())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_released(path)


def test_other_things_that_are_saved(tiny: EDT, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(UserError, match="is not a file"):
        load_released(path)
    for content in ([1, 2], torch.ones(3), {"step": 3, "lr": 0.1}, {"ema": {"a": 1}}):
        save(path, content)
        with pytest.raises(UserError, match="is not a checkpoint"):
            load_released(path)
    save(path, {"model": tiny.state_dict(), "args": None})
    with pytest.raises(UserError, match=r"no 'ema' weights, only 'model'; use .* \(--weights model\)"):
        load_released(path, "ema")
    assert same(load_released(path), tiny)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.mlp.fc2.bias": None}, "'blocks.1.mlp.fc2.bias' is missing"),
        ({"blocks.0.attn.amm": torch.ones(4)}, "'blocks.0.attn.amm' is not a key of it"),
        (
            {"blocks.2.attn.qkv.bias": torch.ones(9), "x.y": torch.ones(1)},
            r"'blocks.2.attn.qkv.bias' has shape \[9\], not \[240\], and 1 more keys differ",
        ),
    ],
)
def test_the_closest_model_and_the_first_difference_are_named(
    tiny: EDT, tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    state = {key: value for key, value in {**tiny.state_dict(), **change}.items() if value is not None}
    with pytest.raises(UserError, match=rf"closest is EDT-Tiny/2 at 64 pixels with 7 classes, but {message}"):
        load_released(save(tmp_path / "a.pt", published(state)))


@pytest.mark.parametrize(
    "shape", [(1, 250, 64), (), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 36, 64), (4,)))]
)
def test_position_embeddings_of_no_square(tiny: EDT, tmp_path: Path, shape: tuple[int, ...]) -> None:
    state = {**tiny.state_dict(), "pos_embed": torch.zeros(shape)}
    with pytest.raises(UserError, match="closest is EDT-Tiny/2"):
        load_released(save(tmp_path / "a.pt", state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.to(torch.int8), r"'blocks.0.attn.qkv.bias' is torch.int8. Weights must be dense"),
        (lambda v: v.to(torch.complex64), r"is torch.complex64"),
        (lambda v: v.bool(), r"is torch.bool"),
        (lambda v: v.to_sparse(), r"is torch.sparse_coo"),
        (lambda v: v.to("meta"), r"is a shape without values"),
        (
            lambda v: v.index_fill(0, torch.tensor([1, 5]), torch.nan),
            r"2 of the 192 values of 'blocks.0.attn.qkv.bias'",
        ),
        (lambda v: v.index_fill(0, torch.tensor([3]), -torch.inf), r"1 of the 192 values .* are not finite"),
        (lambda v: v.double() + 1e300, r"192 of the 192 values .* not finite float32 numbers"),
    ],
    ids=["int8", "complex", "bool", "sparse", "meta", "nan", "infinite", "too large"],
)
def test_weights_that_are_no_finite_numbers_are_refused(tiny: EDT, tmp_path: Path, change: Any, message: str) -> None:
    key = "blocks.0.attn.qkv.bias"
    state = {**tiny.state_dict(), key: change(tiny.state_dict()[key])}
    with pytest.raises(UserError, match=message):
        load_released(save(tmp_path / "a.pt", state))


def test_an_expanded_table_asks_for_no_memory(tiny: EDT, tmp_path: Path) -> None:
    """A file of a few kilobytes can state any number of rows."""
    state = dict(tiny.state_dict())
    row = state["y_embedder.embedding_table.weight"][:1].clone()
    torch.save({**state, "y_embedder.embedding_table.weight": row.expand(10**9, -1)}, tmp_path / "large.pt")
    with pytest.raises(UserError, match=r"embedding_table.weight' has .* values, but the file stores .*expanded"):
        load_released(tmp_path / "large.pt")


def test_all_tensors_that_are_not_finite_are_counted(tiny: EDT, tmp_path: Path) -> None:
    state = {key: value.clone().fill_(torch.nan) for key, value in tiny.state_dict().items()}
    message = f"'pos_embed' are not finite .* and {len(state) - 1} more tensors"
    with pytest.raises(UserError, match=message):
        load_released(save(tmp_path / "a.pt", state))


def trained(objective: str) -> DiT:
    """A small DiT after a few steps of training. Of a velocity, the second half of the output is thrown away."""
    torch.manual_seed(0)
    model = create_model("DiT-Tiny/2", 32, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        x, noise, t, y = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
        output = model(x, t, y)
        first, second = output.chunk(2, dim=1)
        loss = (first - (x - noise)).square().mean() if objective == "velocity" else (output - 1).square().mean()
        assert second.shape == x.shape
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert isinstance(model, DiT)
    return model


def test_a_bare_state_dict_whose_variance_was_never_trained_is_refused(tmp_path: Path) -> None:
    """It has the keys of a DiT; but no gradient ever reached the rows that the training discards."""
    velocity = trained("velocity").state_dict()
    assert bool(velocity["final_layer.linear.weight"].any())
    path = save(tmp_path / "a.pt", velocity)
    with pytest.raises(UserError, match=r"variance are all 0.* a SiT or another model that predicts a velocity"):
        load_released(path)
    save(path, {"model": velocity, "args": argparse.Namespace(model="DiT-Tiny/2")})
    with pytest.raises(UserError, match="variance are all 0"):
        load_released(path)
    save(path, {"model": velocity, "args": argparse.Namespace(prediction="noise")})
    assert any("variance was not trained" in note for note in read_released_model(path).notes)
    loaded = read_released_model(save(path, trained("noise and variance").state_dict()))
    assert [note for note in loaded.notes if "assumed" in note] == list(loaded.notes)


def test_a_released_sit_is_refused_whatever_is_known_of_it(tmp_path: Path) -> None:
    state = {key: value + 0.1 for key, value in create_model("DiT-Tiny/2", 32, 4).state_dict().items()}
    args = argparse.Namespace(model="SiT-XL/2", path_type="Linear", prediction="velocity", loss_weight=None)
    with pytest.raises(UserError, match=r"model='SiT-XL/2', path_type='Linear', prediction='velocity': it is a SiT"):
        load_released(save(tmp_path / "a.pt", published(state, **vars(args))))
    for name in ("SiT-XL-2-256.pt", "last_sit.ckpt"):
        with pytest.raises(UserError, match="the file's name contains SiT"):
            load_released(save(tmp_path / name, state))
    assert load_released(save(tmp_path / "composite.pt", state)).config.name == "DiT-Tiny/2"
    stated = published(state, model="DiT-Tiny/2")
    assert load_released(save(tmp_path / "not-sit.pt", stated)).config.name == "DiT-Tiny/2"


def test_an_output_without_a_variance_is_named(tmp_path: Path) -> None:
    state = create_model("DiT-Tiny/2", 32, 4).state_dict()
    half = {key: value[:16] if key.startswith("final_layer.linear") else value for key, value in state.items()}
    with pytest.raises(UserError, match=r"closest is DiT-Tiny/2 .* predicts no variance \(.*learn_sigma=False\)"):
        load_released(save(tmp_path / "a.pt", half))


@pytest.mark.parametrize("options", [{"image_size": 256}, {"num_classes": 1000}, {"model": "EDT-S/2"}])
def test_options_of_another_model_are_refused(tiny: EDT, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"its training options have .*, but"):
        load_released(save(tmp_path / "a.pt", published(tiny.state_dict(), **options)))


def test_lightning_takes_the_average_and_says_so(tiny: EDT, tmp_path: Path) -> None:
    state, other = tiny.state_dict(), {key: value + 1 for key, value in tiny.state_dict().items()}
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {
            **{f"model._orig_mod.{key}": value for key, value in other.items()},
            **{f"ema_model.module.{key}": value for key, value in state.items()},
            "vae.decoder.conv_in.weight": torch.ones(2),
        },
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "hyper_parameters": {"model": "EDT-Tiny/2", "lr": 1e-4},
    }
    loaded = read_released_model(save(tmp_path / "last.ckpt", content))
    assert same(loaded.model, tiny)
    assert (loaded.label, loaded.is_average) == ("state_dict.ema_model", True)
    assert loaded.notes == (
        "the averaged (EMA) weights 'state_dict.ema_model' were used, not 'state_dict.model'",
        "other tensors of the file were ignored: state_dict.vae",
    )
    assert torch.equal(load_released(tmp_path / "last.ckpt", "model").pos_embed, tiny.pos_embed + 1)


def test_a_distributed_checkpoint_loads_once_converted(tiny: EDT, tmp_path: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    state = tiny.state_dict()
    content = {"model": {key: value + 1 for key, value in state.items()}, "ema": state, "step": 3}
    checkpoint.save(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(UserError, match=r"Convert it with `python -m .*format_utils dcp_to_torch"):
        load_released(tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "a.pt")
    assert same(load_released(tmp_path / "a.pt"), tiny)


def test_safetensors_with_metadata(tiny: EDT, tmp_path: Path) -> None:
    state, path = tiny.state_dict(), tmp_path / "model.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    assert same(load_released(path), tiny)
    save_file(state, path, metadata={"args": json.dumps({"prediction": "v", "model": "EDT-Tiny/2"})})
    with pytest.raises(UserError, match="prediction='v': the model does not predict noise"):
        load_released(path)
    torch.save(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"its name ends in \.safetensors, but"):
        load_released(tmp_path / "other.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="it is a damaged or truncated safetensors file"):
        load_released(path)


def test_a_label_table_without_a_null_class(tiny: EDT, tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", published(tiny.state_dict(), num_classes=8))
    with pytest.raises(UserError, match="8 rows for 8 classes, but 9 are needed"):
        load_released(path)

"""Quantised layers and models: their error, their files, their casts, and the table that chooses them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edt_core.config import ChainConfig
from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer, ModelConfig, build_model, count_macs, count_parameters
from edt_core.models.attention import head_padding
from edt_core.models.quantized import linear as quantized_linear
from edt_core.models.quantized.linear import QuantizedLinear
from edt_core.models.quantized.model import quantizable, quantized_model
from edt_core.models.quantized.record import Quantization, check_group_size
from edt_core.pipeline import EDTPipeline, EDTTransformer
from edt_core.sampling.calibration import balanced_labels, calls_of_chain, chosen_layers, error_rows, layer_errors
from edt_core.sampling.torch_export import save_program
from edt_core.training.speed.compiled import compile_parts, undo_compiled_parts
from jobs.models.open import load_model
from tests.support.models import TINY, drawn_weights, pipeline_folder
from tests.support.trainings import same

# Relative error of a rounding to 2^b levels over the range of a row of normal weights, with some room.
LARGEST = {"int8": 0.02, "int8-weights": 0.012, "int4-weights": 0.12}
CHAIN = ChainConfig(sampler="ddim", num_sampling_steps=4, cfg_scale=1.5)


@pytest.fixture(scope="module")
def model() -> DiffusionTransformer:
    return drawn_weights()


def quantization(model: DiffusionTransformer, scheme: str) -> Quantization:
    return Quantization(scheme, tuple(quantizable(model)), 32 if scheme == "int4-weights" else None)


def inputs(model: DiffusionTransformer, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(3)
    x = torch.randn(rows, config.in_channels, config.latent_size, config.latent_size, generator=generator)
    return x, torch.linspace(10, 900, rows), torch.arange(rows)


@torch.no_grad()
def output(model: nn.Module, call: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    result: Tensor = model(*call)
    return result


@pytest.mark.parametrize("scheme", LARGEST)
def test_a_layer_is_as_exact_as_its_numbers(scheme: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(80, 48)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(48, 80, generator=generator))
    x = torch.randn(3, 7, 80, generator=generator)
    quantized = QuantizedLinear(layer, Quantization(scheme, ("layer",), 32))
    with torch.no_grad():
        error = float((quantized(x) - layer(x)).norm() / layer(x).norm())
    assert LARGEST[scheme] / 8 < error < LARGEST[scheme]
    # What torchao makes of the stored parts is within half a step of each weight.
    weight: Any = quantized.weight(torch.float32)
    parts: Any = quantized
    step = parts.scale.repeat_interleave(80 // parts.scale.shape[1], dim=1)
    assert bool(((weight.dequantize() - layer.weight).abs() <= 0.51 * step).all())
    if scheme == "int4-weights":
        assert parts.scale.shape == (48, 4)  # groups of 20, the largest divisor of 80 up to 32
        assert parts.qdata.nbytes == 48 * 80 // 2


def test_a_compiler_traces_a_quantised_model_without_a_break(model: DiffusionTransformer) -> None:
    made = quantized_model(model, quantization(model, "int8-weights"))
    call = inputs(model)
    expected = output(made, call)
    compile_parts(made, "eager")
    layer: Any = made.get_submodule("blocks.0.mlp.fc1")
    x = torch.randn(2, 4, layer.in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
    undo_compiled_parts(made)
    assert torch.equal(output(made, call), expected)
    assert layer._built is not None
    made.to(torch.bfloat16)  # another dtype: it is built again
    assert layer._built is None


@torch.no_grad()
def test_a_processor_whose_int8_products_saturate_uses_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without VNNI, two products of 127 x 127 in one sum exceed 16 bits, and PyTorch's kernel cuts them off."""
    generator = torch.Generator().manual_seed(0)
    layer, x = nn.Linear(80, 48), torch.randn(2, 5, 80, generator=generator)
    scheme = Quantization("int8", ("layer",))
    monkeypatch.setattr(quantized_linear, "exact_int8_products", lambda: False)
    saturating = QuantizedLinear(layer, scheme)
    monkeypatch.setattr(torch, "_int_mm", None)
    result = saturating(x)
    assert float((result - layer(x)).norm() / layer(x).norm()) < LARGEST["int8"]
    monkeypatch.undo()
    if quantized_linear.exact_int8_products():
        torch.testing.assert_close(QuantizedLinear(layer, scheme)(x), result, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_every_family_is_quantised_and_rebuilt_from_its_configuration(name: str) -> None:
    model = drawn_weights(name)
    call = inputs(model)
    made = quantized_model(model, quantization(model, "int8-weights"))
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    expected, result = output(model, call), output(made, call)
    assert 0 < float((result - expected).norm() / expected.norm()) < 0.03

    stored = json.loads(json.dumps(made.built_config.to_dict()))
    again = build_model(ModelConfig.from_dict(stored)).eval()
    again.load_state_dict(made.state_dict(), strict=True)
    assert torch.equal(output(again, call), result)
    assert (count_parameters(made), count_macs(made)) == (count_parameters(model), count_macs(model))
    assert "quantization" not in model.config.to_dict()


def test_attention_with_padded_heads_is_the_same(model: DiffusionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA heads are padded to a multiple of 8 channels; quantised weights cannot be, so activations are."""
    made = quantized_model(model, quantization(model, "int8"))
    call = inputs(model)
    before = output(made, call)
    assert head_padding(52, torch.device("cuda")) == 4
    monkeypatch.setattr("edt_core.models.attention.head_padding", lambda *_: 4)
    torch.testing.assert_close(output(made, call), before, rtol=1e-4, atol=1e-4)


def test_the_bits_of_float8_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchao's tensor has them, without a GPU that multiplies them."""
    bits = torch.arange(48 * 80, dtype=torch.int64).to(torch.uint8).view(48, 80)
    qdata = torch.where(bits & 127 == 127, 0, bits).to(torch.uint8).view(torch.float8_e4m3fn)  # no NaN

    class Parts:
        """A tensor of torchao, as far as a layer takes it apart and puts it together."""

        def __init__(self, parts: dict[str, Tensor], attributes: dict[str, Any]) -> None:
            self.__dict__ |= parts
            self.attributes = attributes

        def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
            return ["qdata", "scale"], {"dtype": torch.bfloat16}

        @classmethod
        def __tensor_unflatten__(cls, parts: dict[str, Tensor], attributes: dict[str, Any], *_: None) -> "Parts":
            return cls(parts, attributes)

    monkeypatch.setattr(quantized_linear, "check_scheme", lambda _: None)
    monkeypatch.setattr(
        quantized_linear, "_quantized", lambda *_: Parts({"qdata": qdata, "scale": torch.ones(48, 1)}, {})
    )
    layer = QuantizedLinear(nn.Linear(80, 48), Quantization("fp8", ("layer",))).to(torch.bfloat16)
    assert layer.state_dict()["qdata"].dtype == torch.uint8
    again: Any = layer.weight(torch.bfloat16)
    assert again.qdata.dtype == torch.float8_e4m3fn
    assert torch.equal(again.qdata.view(torch.uint8), qdata.view(torch.uint8))
    assert again.attributes == {"dtype": torch.bfloat16}


def test_a_model_is_built_without_memory(model: DiffusionTransformer) -> None:
    """As accelerate builds it for diffusers: each registered parameter is moved and made again."""
    made = quantized_model(model, quantization(model, "int8"))
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        register(module, name, value)
        if value is not None:
            kept = module._parameters[name]
            assert kept is not None
            module._parameters[name] = type(kept)(kept.to("meta"), **kept.__dict__, requires_grad=kept.requires_grad)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", register_empty)
        empty = build_model(made.built_config)
    assert {value.device.type for value in empty.get_submodule("blocks.0.mlp.fc1").state_dict().values()} == {"meta"}
    empty.load_state_dict(made.state_dict(), strict=True, assign=True)
    assert torch.equal(output(empty.eval(), inputs(model)), output(made, inputs(model)))


def test_a_cast_leaves_the_quantised_weights_as_they_are(model: DiffusionTransformer) -> None:
    made = quantized_model(model, quantization(model, "int4-weights"))
    name = next(iter(quantizable(model)))
    before = {key: value.clone() for key, value in made.get_submodule(name).state_dict().items() if key != "bias"}
    x, t, y = inputs(model)
    expected = output(made, (x, t, y))
    result = output(made.to(torch.bfloat16), (x.bfloat16(), t, y))
    assert result.dtype == torch.bfloat16
    assert float((result.float() - expected).norm() / expected.norm()) < 0.03
    after = made.get_submodule(name).state_dict()
    assert after["bias"].dtype == torch.bfloat16
    assert same({key: after[key] for key in before}, before)


def test_a_folder_is_smaller_and_gives_the_same_images(model: DiffusionTransformer, tmp_path: Path) -> None:
    """By each way that a folder is opened: diffusers, in bfloat16 too, and the jobs."""
    made = quantized_model(model, quantization(model, "int8"))
    folder, float_folder = pipeline_folder(tmp_path / "q", made), pipeline_folder(tmp_path / "f", model)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (folder / weights).stat().st_size < 0.4 * (float_folder / weights).stat().st_size
    assert "quantization" not in (float_folder / "transformer/config.json").read_text()
    stored = load_file(folder / weights)
    layer = next(iter(quantizable(model)))
    assert stored[f"edt.{layer}.qdata"].dtype == torch.int8
    assert f"edt.{layer}.weight" not in stored

    call = inputs(model)
    expected = output(made, call)
    pipeline = EDTPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    assert torch.equal(output(pipeline.transformer, call), expected)
    assert torch.equal(output(load_model(str(folder)).model, call), expected)
    image = pipeline([1], num_inference_steps=2, output_type="pt").images
    half = EDTPipeline.from_pretrained(folder, low_cpu_mem_usage=False, torch_dtype=torch.bfloat16)
    part = half.transformer.edt.get_submodule(layer)
    assert part.scale.dtype == torch.float32
    drawn = half([1], num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(drawn.float(), image, rtol=0, atol=0.1)
    pipeline.save_pretrained(tmp_path / "again")
    assert same(load_file(tmp_path / "again" / weights), stored)


def test_a_layer_with_outliers_is_found_and_stays_in_float(model: DiffusionTransformer) -> None:
    planted = drawn_weights()
    layer = planted.get_submodule("blocks.1.mlp.fc1")
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight[:, 0] *= 300  # the scale of each row is that of this column, and the others round to few levels
    calls, total = calls_of_chain(planted, CHAIN, 1000, samples=4, count=3, seed=0)
    assert total == 4
    assert [int(t[0]) for _, t, _ in calls] == sorted((int(t[0]) for _, t, _ in calls), reverse=True)
    assert len(calls) == 3
    errors = layer_errors(planted, calls, "int8-weights")
    assert [each.name for each in errors] == list(quantizable(planted))
    rows = error_rows(errors, ())
    assert rows[0]["layer"] == "blocks.1.mlp.fc1"
    assert rows[0]["worst"] > 3 * rows[1]["worst"]  # type: ignore[operator]
    assert all(len(each.errors) == 3 and each.mean <= each.worst for each in errors)
    chosen = chosen_layers(errors, 3 * sorted(each.worst for each in errors)[len(errors) // 2])
    assert set(quantizable(planted)) - set(chosen) == {"blocks.1.mlp.fc1"}
    assert not any(module._forward_hooks or getattr(module, "calls_layers", False) for module in planted.modules())


def test_the_error_of_a_layer_is_that_of_its_output_alone(model: DiffusionTransformer) -> None:
    calls, _ = calls_of_chain(model, CHAIN, 1000, samples=2, count=1, seed=0)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    name = "blocks.0.adaLN_modulation.1"
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda _m, given, out: seen.update({name: (given[0], out)}))
    output(model, calls[0])
    handle.remove()
    given, expected = seen[name]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        result = QuantizedLinear(layer, Quantization("int8", (name,)))(given)
    error = float((result - expected).norm() / expected.norm())
    (measured,) = (each for each in layer_errors(model, calls, "int8") if each.name == name)
    assert measured.errors == (pytest.approx(error),)
    assert measured.kind == "adaLN"


def test_layers_that_no_chain_calls_stay_in_float() -> None:
    model = drawn_weights("MDTv2-Tiny/2")
    calls, _ = calls_of_chain(model, CHAIN, 1000, samples=2, count=1, seed=0)
    errors = layer_errors(model, calls, "int8-weights")
    unused = {each.name for each in errors if not each.errors}
    assert unused
    assert all("side" in name or "mask" in name for name in unused), unused
    assert unused.isdisjoint(chosen_layers(errors, math.inf))


def test_classes_of_the_samples_are_balanced() -> None:
    assert balanced_labels(6, 3) == [0, 1, 2, 0, 1, 2]
    assert balanced_labels(4, 1000) == [0, 250, 500, 750]


def test_what_cannot_be_is_refused(model: DiffusionTransformer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown quantisation 'int3'; known: int8, int8-weights"):
        Quantization("int3", ())
    with pytest.raises(ValueError, match="the group size of a quantisation is 0; it must be at least 1"):
        Quantization("int4-weights", (), 0)
    config = {**model.config.to_dict(), "quantization": {"scheme": "int8", "layers": ["no.such"]}}
    with pytest.raises(ValueError, match=r"names the layer 'no\.such', but the model has no such linear layer"):
        build_model(ModelConfig.from_dict(config))
    with pytest.raises(ValueError, match="quantization is 'int8'; expected scheme, layers"):
        ModelConfig.from_dict({**config, "quantization": "int8"})
    with pytest.raises(UserError, match=r"--group-size is 64, which does not divide the widths 80 \(for example of a"):
        check_group_size(64, {"a": 80, "b": 128})
    with pytest.raises(UserError, match="--group-size is 4; with fewer than 8 weights"):
        check_group_size(4, {"a": 80})
    made = quantized_model(model, quantization(model, "int8"))
    with pytest.raises(UserError, match=r"quantised \(int8\), and a program of torch.export would need torchao"):
        save_program(tmp_path / "p.pt2", made, CHAIN, 1000)
    transformer = EDTTransformer(edt_config=made.built_config.to_dict())
    assert transformer.edt.built_config == made.built_config


def test_without_torchao_one_message_says_what_to_install(
    model: DiffusionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = quantized_model(model, quantization(model, "int8"))

    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="torchao")

    monkeypatch.setattr(quantized_linear.importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"need torchao, which is not installed; .*'edt-pipeline\[quantize\]'"):
        build_model(made.built_config)
    build_model(model.built_config)  # needs none


def test_fp8_needs_a_gpu_that_has_it(model: DiffusionTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = replace(model.config, quantization=quantization(model, "fp8"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"fp8 needs a GPU of compute capability 8\.9 .* no CUDA device; use int8"):
        build_model(made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(UserError, match=r"but NVIDIA A100 has 8\.0; use int8"):
        build_model(made)


@pytest.fixture
def on_gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [*LARGEST, "fp8"])
def test_on_a_gpu_models_are_as_exact(model: DiffusionTransformer, on_gpu: torch.device, scheme: str) -> None:
    if scheme == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8")
    x, t, y = inputs(model, 32)
    made = quantized_model(model, quantization(model, scheme)).to(on_gpu)
    expected, result = output(model, (x, t, y)), output(made, (x.to(on_gpu), t.to(on_gpu), y.to(on_gpu))).cpu()
    assert float((result - expected).norm() / expected.norm()) < 0.3

"""What people who know diffusers do with a pipeline: dtypes, output types, their names for options, saving, copies."""

import copy
import importlib
import json
import pickle
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import check_imports
from torch import Tensor

from edt_core.autoencoders.kinds import scale_of
from edt_core.errors import UserError
from edt_core.pipeline import EDTPipeline, EDTTransformer, save_pipeline
from tests.support.cases import suite_of
from tests.support.pipelines import quiet, small_pipeline, tensors

LABELS = [3, 1, 0]
LOW = [torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_pipeline(tmp_path_factory.mktemp("pipeline") / "p")


@pytest.fixture
def pipeline(folder: Path) -> EDTPipeline:
    return quiet(EDTPipeline.from_pretrained(folder))


def drawn(pipeline: Any, **options: Any) -> Tensor:
    """Latents of LABELS, in which rounding shows that levels of images hide."""
    latents: Tensor = pipeline(LABELS, output_type="latent", **options).images
    return latents


DOORS = ("from_pretrained", "to", "custom_pipeline")


@pytest.mark.parametrize(
    ("door", "dtype"), suite_of(list(zip(DOORS, (*LOW, LOW[0]), strict=True)), product(DOORS, LOW))
)
def test_every_weight_has_the_dtype_asked_for_and_it_samples(folder: Path, door: str, dtype: torch.dtype) -> None:
    if door == "from_pretrained":
        pipeline = EDTPipeline.from_pretrained(folder, torch_dtype=dtype)
    elif door == "to":
        pipeline = EDTPipeline.from_pretrained(folder).to(dtype)
    else:
        pipeline = DiffusionPipeline.from_pretrained(
            folder, custom_pipeline=str(folder), trust_remote_code=True, torch_dtype=dtype
        )
    assert {tensor.dtype for tensor in tensors(pipeline) if tensor.is_floating_point()} == {dtype}
    exact = drawn(quiet(EDTPipeline.from_pretrained(folder)), amm_blocks=[1, 2])
    error = (drawn(quiet(pipeline), amm_blocks=[1, 2]) - exact).abs().max() / exact.abs().max()
    assert 0 < error < (0.02 if dtype == torch.bfloat16 else 0.003)  # epsilon is 0.0078 and 0.00098
    images = pipeline(LABELS, output_type="pt").images
    assert images.dtype == dtype
    assert torch.isfinite(images).all()


def test_each_part_may_have_a_dtype_of_its_own(folder: Path) -> None:
    dtypes = {"transformer": torch.bfloat16, "default": torch.float32}
    pipeline = quiet(EDTPipeline.from_pretrained(folder, torch_dtype=dtypes))
    assert (pipeline.transformer.dtype, pipeline.vae.dtype) == (torch.bfloat16, torch.float32)
    assert len(pipeline(LABELS).images) == 3


def test_what_is_not_finite_in_the_decoder_is_refused(pipeline: EDTPipeline) -> None:
    pipeline.to(torch.float16)
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.mul_(1e4)
    with pytest.raises(UserError, match=r"not finite in torch\.float16.*pipeline\.vae\.to\(torch\.float32\)"):
        pipeline(LABELS)
    assert torch.isfinite(drawn(pipeline)).all()


def test_output_types_are_those_of_diffusers(pipeline: EDTPipeline) -> None:
    pil = np.stack(pipeline(LABELS).images)
    array = pipeline(LABELS, output_type="np").images
    tensor = pipeline(LABELS, output_type="pt").images
    assert (array.shape, array.dtype) == ((3, 32, 32, 3), np.float32)
    assert (tuple(tensor.shape), tensor.dtype) == ((3, 3, 32, 32), torch.float32)
    assert 0 <= array.min() < array.max() <= 1
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert np.abs(array * 255 - pil).max() < 0.51  # the same images, before they are rounded to levels
    for image, own in zip(pipeline.numpy_to_pil(array), pil, strict=True):
        assert np.abs(np.asarray(image).astype(int) - own).max() <= 1
    (tensor * torch.ones(1, requires_grad=True)).sum().backward()  # no tensor of inference mode


def test_latents_are_on_the_models_scale(pipeline: EDTPipeline) -> None:
    latents = drawn(pipeline)
    assert (tuple(latents.shape), latents.dtype) == ((3, 4, 8, 8), torch.float32)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    assert torch.equal((decoded / 2 + 0.5).clamp(0, 1), pipeline(LABELS, output_type="pt").images)
    assert scale_of(pipeline.vae).is_plain


@pytest.mark.parametrize("output_type", ["nonsense", None, "PIL", ["np"]])
def test_other_output_types_are_refused(pipeline: EDTPipeline, output_type: Any) -> None:
    with pytest.raises(ValueError, match=r"output_type is .*; use one of 'pil', 'np', 'pt', 'latent'"):
        pipeline(LABELS, output_type=output_type)


def test_names_of_diffusers_mean_the_same(pipeline: EDTPipeline) -> None:
    ours = drawn(pipeline, cfg_scale=3.0, num_sampling_steps=5)
    assert torch.equal(drawn(pipeline, guidance_scale=3.0, num_inference_steps=5), ours)
    unguided = drawn(pipeline, cfg_scale=1.0)
    assert torch.equal(drawn(pipeline, guidance_scale=0), unguided)
    assert not torch.equal(unguided, drawn(pipeline))
    output = pipeline(LABELS, return_dict=False)
    assert isinstance(output, tuple)
    assert [image.size for image in output[0]] == [(32, 32)] * 3
    for labels in (np.array(LABELS), torch.tensor(LABELS), tuple(LABELS)):
        assert torch.equal(pipeline(labels, output_type="latent").images, drawn(pipeline))


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_generators_decide_all_noise(pipeline: EDTPipeline, sampler: str) -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]

    pipeline.set_progress_bar_config(disable=True)
    first, again = (drawn(pipeline, sampler=sampler, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, drawn(pipeline, sampler=sampler))
    several = drawn(pipeline, sampler=sampler, generator=generators())
    assert torch.equal(several, drawn(pipeline, sampler=sampler, generator=tuple(generators())))
    alone = pipeline(LABELS[:1], output_type="latent", sampler=sampler, generator=generators()[:1]).images
    torch.testing.assert_close(alone, several[:1], rtol=1e-4, atol=1e-4 * float(several.abs().max()))
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    if sampler == "ddim":  # which draws nothing more: diffusers' own start gives the same
        assert torch.equal(drawn(pipeline, sampler=sampler, latents=noise), first)
        halves = [drawn(pipeline, sampler=sampler, latents=noise.to(dtype)) for dtype in (torch.float32, torch.float64)]
        assert torch.equal(*halves)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"guidance_scale": 2.0, "cfg_scale": 2.0}, "guidance_scale and cfg_scale are names of the same option"),
    ({"num_inference_steps": 4, "num_sampling_steps": 4}, "num_inference_steps and num_sampling_steps are names of"),
    ({"guidance_scale": -1.0}, r"option 'guidance_scale': .*greater than or equal to 1 \(got -1\.0\)"),
    ({"guidance_scale": "high"}, r"option 'guidance_scale': .*\(got 'high'\)"),
    ({"guidance_scale": float("nan")}, "option 'guidance_scale': .*finite"),
    ({"num_inference_steps": 2.5}, "option 'num_inference_steps': .*integer"),
    ({"num_images_per_prompt": 2}, r"num_images_per_prompt of diffusers is not supported: repeat a label"),
    ({"callback_on_step_end": print}, "callback_on_step_end of diffusers is not supported: .*set_progress_bar_config"),
    ({"prompt": "a cat"}, "prompt of diffusers is not supported: .*class_labels"),
    ({"height": 64, "width": 64}, "height of diffusers is not supported: .*one size"),
    ({"seed": 1, "generator": torch.Generator()}, "seed is 1 and generator is set too"),
    ({"seed": -1}, "seed is -1; use an integer of at least 0"),
    ({"seed": 1.5}, r"seed is 1\.5; use an integer"),
    ({"seed": True}, "seed is True; use an integer"),
    ({"generator": [torch.Generator()]}, "1 generators for 3 images"),
    ({"generator": 5}, r"generator is int; use a torch\.Generator"),
    ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents is torch\.float32 \[1, 4, 8, 8\]; .*\[3, 4, 8, 8\]"),
    ({"latents": np.zeros((3, 4, 8, 8))}, "latents is ndarray"),
    ({"latents": torch.zeros(3, 4, 8, 8, dtype=torch.int64)}, r"latents is torch\.int64"),
    ({"latents": torch.full((3, 4, 8, 8), float("nan"))}, "are not finite"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_options_that_contradict_or_do_not_exist(pipeline: EDTPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(LABELS, **options)


@pytest.mark.parametrize("labels", [3, "cat", ["cat"], [1.5], [[1, 2]], [True], torch.tensor([1.5])])
def test_labels_of_another_kind(pipeline: EDTPipeline, labels: Any) -> None:
    with pytest.raises(UserError, match=r"invalid class labels .*; use a list of at least one label in 0\.\.3"):
        pipeline(labels)


def test_copies_make_the_same_pictures(pipeline: EDTPipeline) -> None:
    amm = EDTPipeline(**{**pipeline.components, "protocol": {**pipeline.config.protocol, "amm_blocks": [1]}})
    expected = drawn(quiet(amm))
    assert not torch.equal(expected, drawn(pipeline))
    for made in (
        EDTPipeline(**amm.components),
        EDTPipeline.from_pipe(amm),
        copy.deepcopy(amm),
        pickle.loads(pickle.dumps(amm)),
    ):
        assert torch.equal(drawn(quiet(made)), expected)
        assert (made.config.protocol, list(made.config.classes)) == (amm.config.protocol, list("abcd"))
        assert made.config.num_timesteps == 1000
    output = pickle.loads(pickle.dumps(pipeline(LABELS, output_type="np")))
    assert np.array_equal(output.images, pipeline(LABELS, output_type="np").images)


def test_a_saved_folder_loads_by_both_doors_and_tells_no_path(
    folder: Path, pipeline: EDTPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "again")
    pipeline.save_pretrained(tmp_path / "again")  # over what it wrote itself
    again = tmp_path / "again"
    general = DiffusionPipeline.from_pretrained(again, custom_pipeline=str(again), trust_remote_code=True)
    assert torch.equal(drawn(quiet(general)), drawn(pipeline))
    assert str(pipeline.config._name_or_path) == str(folder)  # in memory it stays
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert {path.relative_to(again).as_posix() for path in again.rglob("*")} == names
    for path in (path for path in again.rglob("*") if path.is_file()):
        assert path.read_bytes() == (folder / path.relative_to(again)).read_bytes(), path


def test_an_autoencoder_that_was_loaded_somewhere_does_not_say_where(pipeline: EDTPipeline, tmp_path: Path) -> None:
    pipeline.vae.save_pretrained(tmp_path / "home of somebody")
    vae = AutoencoderKL.from_pretrained(tmp_path / "home of somebody")
    assert "home of somebody" in str(vae.config._name_or_path)
    protocol = {"num_sampling_steps": 2}
    save_pipeline(tmp_path / "p", pipeline.transformer.edt, vae, num_timesteps=1000, classes="abcd", protocol=protocol)
    for path in (path for path in (tmp_path / "p").rglob("*") if path.is_file()):
        assert b"somebody" not in path.read_bytes(), path
    assert "_name_or_path" not in json.loads((tmp_path / "p" / "vae" / "config.json").read_text())


def test_a_program_of_the_user_is_not_overwritten(pipeline: EDTPipeline, tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text("print('mine')\n")
    with pytest.raises(UserError, match=r"pipeline\.py is of another program.*save to another folder"):
        pipeline.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline.py"]


@pytest.mark.parametrize(
    ("missing", "error", "message"),
    [
        ("edt_core", ImportError, r"a class of the package edt-pipeline; install its wheel"),
        ("safetensors", ModuleNotFoundError, "no safetensors"),  # the package is there, and what it needs is not
    ],
)
def test_without_the_package_a_folder_says_what_to_install(
    folder: Path,
    missing: str,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def imported(_name: str) -> None:
        raise ModuleNotFoundError(f"no {missing}", name=missing)

    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", imported)
        with pytest.raises(error, match=message):
            exec((folder / "pipeline.py").read_text(), {})
    with caplog.at_level("WARNING"):
        check_imports(folder / "pipeline.py")
    assert caplog.text == ""  # diffusers does not tell to install edt_core, which is no package


def test_a_variant_in_shards(pipeline: EDTPipeline, tmp_path: Path) -> None:
    half = pipeline.to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="500KB")
    assert len(list((tmp_path / "transformer").glob("*.fp16-*.safetensors"))) > 1
    loaded = quiet(EDTPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16))
    assert torch.equal(drawn(loaded), drawn(half))
    full = EDTPipeline.from_pretrained(tmp_path, variant="fp16", use_safetensors=True)
    assert {tensor.dtype for tensor in tensors(full) if tensor.is_floating_point()} == {torch.float32}


def test_a_variant_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ValueError, match="variant=fp16"):
        EDTPipeline.from_pretrained(folder, variant="fp16")


def test_the_transformer_alone(pipeline: EDTPipeline, tmp_path: Path) -> None:
    pipeline.transformer.save_pretrained(tmp_path)
    alone = EDTTransformer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in alone.parameters()} == {torch.bfloat16}
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 900.0]), torch.tensor([0, 4])
    with torch.no_grad():
        exact, found = pipeline.transformer(*inputs), alone(inputs[0].bfloat16(), *inputs[1:])
    assert float((found.float() - exact).abs().max() / exact.abs().max()) < 0.05


def test_a_compiled_transformer_is_what_runs_and_is_saved_as_it_was(pipeline: EDTPipeline, tmp_path: Path) -> None:
    steps = {"num_inference_steps": 2}
    expected, calls = drawn(pipeline, **steps), []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        def run(*inputs: Any) -> Any:
            calls.append(1)
            return graph.forward(*inputs)

        return run

    pipeline.transformer = torch.compile(pipeline.transformer, backend=backend)
    # A graph may compute with other kernels than the model itself, whose last bits differ on some processors.
    assert float((drawn(pipeline, **steps) - expected).abs().max() / expected.abs().max()) < 1e-5
    assert len(calls) >= 2  # once a step
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(drawn(quiet(EDTPipeline.from_pretrained(tmp_path)), **steps), expected)


def test_hooks_of_the_transformer_run(pipeline: EDTPipeline) -> None:
    """Offloading moves the weights by hooks: a model that is called past them computes where they are not."""
    calls: list[int] = []
    pipeline.transformer.register_forward_pre_hook(lambda _module, _inputs: calls.append(1))
    drawn(pipeline)
    assert len(calls) == 4
    assert EDTPipeline.model_cpu_offload_seq == "transformer->guide->vae->classifier"


def test_weights_without_values_are_refused(pipeline: EDTPipeline) -> None:
    with pytest.raises(UserError, match=r"on the device meta.*load it again"):
        pipeline.to("meta")(LABELS)


def test_sequential_offload_is_refused(pipeline: EDTPipeline) -> None:
    with pytest.raises(UserError, match="use enable_model_cpu_offload"):
        pipeline.enable_sequential_cpu_offload()


def test_the_progress_bar_counts_steps(pipeline: EDTPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline(LABELS)
    assert capsys.readouterr().err == ""
    pipeline.set_progress_bar_config(disable=False)
    pipeline(LABELS)
    assert "4/4" in capsys.readouterr().err


def test_attention_slicing_changes_nothing(pipeline: EDTPipeline) -> None:
    expected = drawn(pipeline)
    pipeline.enable_attention_slicing()
    assert torch.equal(drawn(pipeline), expected)

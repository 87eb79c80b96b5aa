"""`edt cost --acceptance`: hours by the rates that a card reached, and what they come from where a row is missing."""

import json
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edt_core.config import SampleConfig, TrainConfig
from edt_core.errors import UserError
from edt_core.models import MODEL_NAMES, model_config, training_flops
from pipelines.config.schema import load_config
from pipelines.setup.acceptance_file import autoencoder_flops, forward_flops, read_measurements
from pipelines.setup.measured_time import Setting, StepTime, chain_passes, step_times, trainings_of
from tests.support.acceptance import HEAD, content, row
from tests.support.pages import ROOT
from tests.support.small import edt

IMAGENET = 1_281_167


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    def written(values: Mapping[str, Any]) -> Path:
        path = tmp_path / "acceptance.json"
        path.write_text(json.dumps(values))
        return path

    return written


def times(
    path: Path,
    *models: str,
    config: str = "imagenet256-edt-s",
    devices: int = 8,
    images: int = IMAGENET,
    assignments: tuple[str, ...] = (),
) -> dict[str, StepTime]:
    loaded = load_config(config, assignments)
    setting = Setting(read_measurements(path), loaded, loaded.preprocess.image_size, images, devices)
    return {time.step: time for time in step_times(setting, trainings_of(loaded, models))}


def hours(time: StepTime) -> float:
    assert time.hours is not None
    return time.hours


def test_a_measured_row_is_the_time(write: Any) -> None:
    """Images over images per second, on 8 GPUs; two models are sampled, with 25 times the steps of the row."""
    estimated = times(write(content()))
    assert list(estimated) == ["encode", "train EDT-S/2", "sample EDT-S/2", "decode EDT-S/2"]
    assert hours(estimated["encode"]) == pytest.approx(2 * IMAGENET / 100 / 8 / 3600)
    assert hours(estimated["train EDT-S/2"]) == pytest.approx(400_000 * 256 / 5000 / 8 / 3600), "32 images on each GPU"
    assert hours(estimated["sample EDT-S/2"]) == pytest.approx(100_000 * 25 / 75 / 8 / 3600), (
        "the configuration uses AMM"
    )
    assert hours(estimated["decode EDT-S/2"]) == pytest.approx(100_000 / 50 / 8 / 3600)
    assert {step: time.source for step, time in estimated.items()} == {
        "encode": "encoding at 256 px, fp32, channels first",
        "train EDT-S/2": "EDT-S/2 at 32, bf16 compiled",
        "sample EDT-S/2": "sampling, EDT-S/2 fp32, AMM",
        "decode EDT-S/2": "decoding at 256 px, fp32, channels first",
    }
    alone = times(write(content()), devices=1)["train EDT-S/2"]
    assert (alone.source, hours(alone)) == ("EDT-S/2 at 256, bf16 compiled", pytest.approx(400_000 * 256 / 6000 / 3600))


def test_each_seed_of_a_model_is_a_training_and_a_set_of_samples(write: Any) -> None:
    path, seeds = write(content()), ("train.seeds=[0, 1, 2]",)
    one, three = times(path), times(path, assignments=seeds)
    assert hours(three["train EDT-S/2"]) == pytest.approx(3 * hours(one["train EDT-S/2"]))
    assert three["train EDT-S/2"].work == f"3 x {one['train EDT-S/2'].work}"
    assert hours(three["sample EDT-S/2"]) == pytest.approx(2 * hours(one["sample EDT-S/2"])), "and the untrained model"
    assert three["decode EDT-S/2"].work == "4 x 50,000 samples"
    assert hours(times(path, "EDT-B/2", assignments=seeds)["train EDT-B/2"]) == pytest.approx(
        3 * hours(times(path, "EDT-B/2")["train EDT-B/2"])
    )
    short = times(path, assignments=(*seeds, "train.max_hours=0.5"))["train EDT-S/2"]
    assert (short.hours, short.source.partition(";")[0]) == (1.5, "train.max_hours")


def test_what_was_not_measured_is_scaled_by_operations(write: Any) -> None:
    """EDT-B is between S and XL: it takes the utilisation of the one whose operations are nearer, which is S."""
    estimated = times(write(content()), "EDT-S/2", "EDT-B/2", "EDT-XL/2", devices=1)
    small, medium = (training_flops(model_config(f"EDT-{size}/2"), masked=True) for size in "SB")
    assert estimated["train EDT-B/2"].source == "scaled from EDT-S/2 at 256, bf16 compiled"
    assert hours(estimated["train EDT-B/2"]) / hours(estimated["train EDT-S/2"]) == pytest.approx(medium / small)
    assert estimated["train EDT-XL/2"].source == "EDT-XL/2 at 64, bf16 compiled"
    assert estimated["sample EDT-B/2"].source == "scaled from sampling, EDT-S/2 fp32, AMM"
    ratio = forward_flops(model_config("EDT-B/2")) / forward_flops(model_config("EDT-S/2"))
    assert hours(estimated["sample EDT-B/2"]) / hours(estimated["sample EDT-S/2"]) == pytest.approx(ratio)


def test_another_size_of_images_is_scaled_from_the_same_model(write: Any) -> None:
    estimated = times(write(content()), config="imagenet512-edt-s", devices=1)
    assert estimated["train EDT-S/2"].source == "scaled from EDT-S/2 at 256, bf16 compiled"
    assert estimated["decode EDT-S/2"].source == "decoding 8 images at 512 px at once, fp32"
    assert estimated["encode"].source == "scaled from encoding at 256 px, fp32, channels first"
    assert hours(estimated["encode"]) > 4 * hours(times(write(content()), devices=1)["encode"])


def test_another_precision_is_scaled_by_matrix_products(write: Any) -> None:
    estimated = times(write(content()), devices=1, assignments=("encode.precision=tf32", "train.precision=tf32"))
    assert hours(estimated["encode"]) == pytest.approx(2 * IMAGENET / 100 / 3600 / (300 / 50))
    assert (
        estimated["encode"].source == "scaled from encoding at 256 px, fp32, channels first, by matrix products in tf32"
    )
    assert hours(estimated["train EDT-S/2"]) == pytest.approx(400_000 * 256 / 6000 / 3600 / (300 / 600))
    unknown = times(write(content()), assignments=("encode.precision=fp16",))["encode"]
    assert (unknown.hours, unknown.source) == (None, "not measured")


@pytest.mark.parametrize(
    ("left_out", "step"),
    [("EDT-", "train EDT-S/2"), ("sampling", "sample EDT-S/2"), ("encoding", "encode"), ("decoding", "decode EDT-S/2")],
)
def test_what_no_row_is_like_is_not_measured(left_out: str, step: str, write: Any) -> None:
    estimated = times(write(content(left_out)))
    assert (estimated[step].hours, estimated[step].source) == (None, "not measured")
    assert all(time.hours is not None for other, time in estimated.items() if other != step)


def test_an_autoencoder_of_another_shape_is_not_measured(write: Any) -> None:
    estimated = times(write(content()), config="quickstart", images=1797, devices=1)
    for step in ("encode", "decode EDT-Tiny/2"):
        assert estimated[step].hours is None
        assert "another shape than SD-VAE" in estimated[step].source
    assert hours(estimated["train EDT-Tiny/2"]) > 0


def test_a_host_that_feeds_too_slowly_limits_the_training(write: Any) -> None:
    slow = {
        **content("feeding"),
        "rows": [*content("feeding")["rows"], row("E", "feeding, batch 256, one rank of 8", 500.0, "images/s", "")],
    }
    estimated = times(write(slow))["train EDT-S/2"]
    assert estimated.source == "limited by feeding, batch 256, one rank of 8"
    assert hours(estimated) == pytest.approx(400_000 * 256 / 500 / 8 / 3600)


def test_a_training_that_starts_from_a_model_is_sampled_alone(write: Any) -> None:
    both = times(write(content()))
    one = times(write(content()), assignments=("train.init_from=edt-s@champion",))
    for step in ("sample EDT-S/2", "decode EDT-S/2"):
        assert hours(one[step]) == pytest.approx(hours(both[step]) / 2)
    short = times(write(content()), assignments=("train.max_hours=0.1",))["train EDT-S/2"]
    assert (short.hours, short.source) == (0.1, "train.max_hours; EDT-S/2 at 32, bf16 compiled")


def test_guidance_takes_a_second_pass_in_its_interval() -> None:
    assert chain_passes(SampleConfig(num_sampling_steps=100), TrainConfig()) == 100
    assert chain_passes(SampleConfig(num_sampling_steps=100, cfg_scale=2.0), TrainConfig()) == 200
    middle = SampleConfig(num_sampling_steps=100, cfg_scale=2.0, guidance_interval=(200, 700))
    assert chain_passes(middle, TrainConfig()) == 150
    late = SampleConfig(num_sampling_steps=100, cfg_scale=2.0, guidance_interval=(900, 5000))
    assert chain_passes(late, TrainConfig()) == pytest.approx(110)


def test_a_guide_costs_its_own_operations(write: Any) -> None:
    """Here one of half the model's operations: a pass of it is half a pass."""
    assert chain_passes(SampleConfig(num_sampling_steps=100, cfg_scale=2.0), TrainConfig(), 0.5) == 150
    config = load_config("imagenet256-edt-s", ["sample.cfg_scale=2.0"])
    alone = Setting(read_measurements(write(content())), config, 256, IMAGENET, 8)
    small = replace(alone, guide=model_config("DiT-S/2"))
    share = forward_flops(model_config("DiT-S/2")) / forward_flops(model_config("EDT-S/2"))
    steps = [
        {time.step: time for time in step_times(setting, trainings_of(config, []))}["sample EDT-S/2"]
        for setting in (alone, small)
    ]
    assert (steps[1].flops or 0) / (steps[0].flops or 1) == pytest.approx((1 + share) / 2)


def test_each_guided_step_decodes_what_a_classifier_sees(write: Any) -> None:
    """Of 50 steps of two sets of 50,000 samples, half are guided."""
    half = ("sample.cfg_scale=2.0", "sample.num_sampling_steps=50", "sample.guidance_interval=[0, 500]")
    metric = ("extractors=[classifier]", "promote.metric=fd_classifier")
    confused = times(write(content()), assignments=(*half, *metric, "sample.guidance_reference=confused"))
    decoded = confused["decode EDT-S/2"].flops
    assert decoded is not None
    assert confused["classify EDT-S/2"].flops == 25 * decoded
    assert "classify EDT-S/2" not in times(write(content()), assignments=half)


def test_a_copy_that_is_trained_on_own_samples_takes_its_time(write: Any) -> None:
    """40,000 samples of 250 steps, where the two sets that are measured have 100,000; and 1,000 steps of 400,000."""
    own = ("sample.guide=own-samples", "sample.cfg_scale=2.0", "sims.num_samples=40_000")
    estimated = times(write(content()), assignments=own)
    unguided = times(write(content()), assignments=("sample.cfg_scale=1.0", "sample.amm_blocks=[]"))
    steps = ["train EDT-S/2", "sample own EDT-S/2", "train own EDT-S/2", "sample EDT-S/2"]
    assert [step for step in estimated if "EDT" in step] == [*steps, "decode EDT-S/2"]
    sampled, trained = unguided["sample EDT-S/2"].flops, estimated["train EDT-S/2"].flops
    assert (estimated["sample own EDT-S/2"].flops or 0) * 10 == (sampled or 0) * 4
    assert (estimated["train own EDT-S/2"].flops or 0) * 400 == trained


def test_a_step_of_heun_takes_two_passes() -> None:
    flow = TrainConfig(objective="flow")
    half = {"num_sampling_steps": 100, "cfg_scale": 2.0, "guidance_interval": (0.5, 1.0)}
    assert chain_passes(SampleConfig(sampler="heun", num_sampling_steps=100), flow) == 200
    assert chain_passes(SampleConfig(sampler="heun", **half), flow) == 300
    assert chain_passes(SampleConfig(sampler="sde", **half), flow) == 150


def test_a_model_without_masks_is_timed_by_another_recipe(write: Any) -> None:
    estimated = times(write(content()), "DiT-S/2", devices=1)["train DiT-S/2"]
    assert estimated.flops == 400_000 * 256 * training_flops(model_config("DiT-S/2"), masked=False)
    assert "DiT-S/2" in MODEL_NAMES


def test_the_autoencoder_is_counted_as_the_guides_state() -> None:
    """docs/imagenet.md: 273 GFLOPs to encode an image at 256 px, 622 to decode it."""
    assert autoencoder_flops("encode", 256) / 1e9 == pytest.approx(273, abs=0.5)
    assert autoencoder_flops("decode", 256) / 1e9 == pytest.approx(622, abs=0.5)
    with pytest.raises(ValueError, match="not a multiple of 8"):
        autoencoder_flops("encode", 250)


# --- files that cannot be used


def spoilt(change: Callable[[dict[str, Any]], object]) -> str:
    values = deepcopy(content())
    change(values)
    return json.dumps(values)


def failed(values: dict[str, Any]) -> None:
    values["rows"][0].update(passed=False, value=0.3, note="bias tables")


BAD: list[tuple[str, str]] = [
    ("", "is not JSON"),
    ("\x00\x01", "is not JSON"),
    (json.dumps(content())[:-200], "is not JSON"),
    ("[" * 100_000, "nested too deep"),
    ("[]", "has no format number"),
    ("{}", "has no format number"),
    (json.dumps({"train": [1, 2]}), "has no format number"),
    (spoilt(lambda v: v.update(format=2)), "has format '2', but a file of this version"),
    (spoilt(lambda v: v.update(format=True)), "has format 'True'"),
    (spoilt(lambda v: v.pop("rows")), "rows: Field required"),
    (spoilt(lambda v: v.pop("card")), "card: Field required"),
    (spoilt(lambda v: v.update(card=["H100"])), "card: Input should be a valid string"),
    (spoilt(lambda v: v.update(card="x" * 10_000)), "card: String should have at most"),
    (spoilt(lambda v: v["rows"][5].pop("unit")), "rows.5.unit: Field required"),
    (spoilt(lambda v: v["rows"][5].update(value="4000")), "rows.5.value: Input should be a valid number"),
    (spoilt(lambda v: v["rows"][5].update(value=float("nan"))), "rows.5.value: Input should be a finite number"),
    (spoilt(lambda v: v["rows"][5].update(value=1e400)), "rows.5.value: Input should be a finite number"),
    (spoilt(lambda v: v["rows"][5].update(value=0)), "0 images/s is no rate"),
    (spoilt(lambda v: v["rows"][5].update(value=-4000)), "-4000 images/s is no rate"),
    (spoilt(lambda v: v["rows"][5].update(value=1e300)), "images/s is no rate"),
    (spoilt(lambda v: v["rows"][1].update(value=0.0)), "0 TFLOP/s is no rate"),
    (spoilt(lambda v: v["rows"][5].update(name="EDT-Q/2 at 256, bf16 eager")), "Unknown model 'EDT-Q/2'"),
    (spoilt(lambda v: v["rows"][14].update(name="encoding at 250 px, fp32, channels first")), "250 px are not"),
    (spoilt(lambda v: v["rows"][12].update(note="some steps")), "does not state the steps"),
    (spoilt(failed), r"a check of correctness failed, EDT-S/2, fp32: output \(bias tables\)"),
]


@pytest.mark.parametrize(("text", "said"), BAD, ids=[f"{number}: {said}" for number, (_, said) in enumerate(BAD)])
def test_a_file_that_cannot_be_used_is_one_message(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as raised:
        read_measurements(path)
    assert str(raised.value).startswith(str(path))
    assert len(str(raised.value)) - len(str(path)) < 600


def test_a_place_without_a_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_measurements(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="is a folder"):
        read_measurements(tmp_path)


def test_rows_that_are_no_rates_are_passed_over(write: Any) -> None:
    """Rows that a later section adds, of other units and names, numbers of any length, and a batch of 0."""
    values = content()
    values["rows"] += [
        row("C", "EDT-S/2 at 0, bf16 eager", 4000.0, "images/s", ""),
        row("C", f"EDT-S/2 at {'9' * 5000}"[:280] + ", bf16 eager", 4000.0, "images/s", ""),
        row("D", "encoding at 0 px, fp32, channels first", 1.0, "images/s", ""),
        row("E", "feeding, batch 0, one rank of 0", 1.0, "images/s", ""),
        row("F", "something new", 1.0, "images/s", ""),
    ]
    assert read_measurements(write(values)) == read_measurements(write(content()))


# --- the command


def test_the_command_prints_the_card_and_the_table(write: Any) -> None:
    path = write(content())
    done = edt("cost", "EDT-S/2", "EDT-B/2", "--acceptance", str(path), "--num-gpus", "8")
    assert done.returncode == 0, done.stderr
    for part in ("NVIDIA H100 80GB HBM3", "2026-11-29", "3f2a9c100000", "2.13.0+cu130", "8 such GPUs", "GPU-hours"):
        assert part in done.stdout, part
    assert "scaled from EDT-S/2 at 32, bf16 compiled" in done.stdout
    assert "1,281,167 images" in done.stdout
    assert "not times of a GPU" not in done.stdout


def test_the_guide_shows_what_the_command_prints(write: Any) -> None:
    """docs/imagenet.md has the command, and its output for made-up rates."""
    text = (ROOT / "docs" / "imagenet.md").read_text()
    (shown,) = re.findall(r"```text\n(Imaginary GPU\n.*?)```", text, flags=re.DOTALL)
    (command,) = re.findall(r"^    edt (cost EDT-S/2 .*)$", text, flags=re.MULTILINE)
    path = str(write(content(card="Imaginary GPU")))
    words = command.replace("acceptance.json", path).split()
    assert edt(*words).stdout == shown


def test_json_has_every_number(write: Any) -> None:
    path = write(content("EDT-S/2, fp32"))
    done = edt("cost", "--acceptance", str(path), "--num-gpus", "2", "--num-images", "1000", "--json")
    estimated = json.loads(done.stdout)
    assert estimated["acceptance"] == {
        "card": "NVIDIA H100 80GB HBM3",
        "on_gpu": True,
        "started": "2026-11-29T20:11:07Z",
        "code": HEAD["code"],
        "torch": "2.13.0+cu130",
        "is_checked": False,
    }
    assert (estimated["devices"], estimated["images"]) == (2, 1000)
    encode = estimated["steps"][0]
    assert encode["hours"] == pytest.approx(2000 / 100 / 2 / 3600)
    assert encode["device_hours"] == pytest.approx(2 * encode["hours"])
    assert encode["device_days"] == pytest.approx(encode["device_hours"] / 24)
    assert encode["flops"] == 2000 * autoencoder_flops("encode", 256)


def test_a_file_of_a_cpu_is_named_as_what_it_is(write: Any) -> None:
    path = write(
        content("EDT-S/2, fp32", card="AMD EPYC \x1b[31m7B13", memory_gib=None, cuda=None, driver=None, nccl=None)
    )
    done = edt("cost", "--acceptance", str(path))
    assert done.returncode == 0, done.stderr
    assert "a CPU: these are not times of a GPU" in done.stdout
    assert "machine-hours" in done.stdout
    assert "GPU-hours" not in done.stdout
    assert "correctness was not checked" in done.stdout
    assert "\x1b" not in done.stdout
    estimated = json.loads(edt("cost", "--acceptance", str(path), "--json").stdout)
    (train,) = (step for step in estimated["steps"] if step["step"].startswith("train"))
    assert train["source"] == "EDT-S/2 at 256, bf16 eager", "by default nothing is compiled on a CPU"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-gpus", "8"], "needs --acceptance FILE"),
        (["--config", "quickstart"], "needs --acceptance FILE"),
        (["--set", "train.max_steps=5"], "needs --acceptance FILE"),
        (["--num-images", "5"], "needs --acceptance FILE"),
        (["--acceptance", "FILE", "--by-module"], "give one of the two"),
        (["--acceptance", "FILE", "--cache", "{kind: delta}"], "write --set 'sample.cache={kind: delta}'"),
        (["--acceptance", "FILE", "--image-size", "256,512"], "are estimated for one size"),
        (["--acceptance", "FILE", "--config", "nowhere"], "no configuration 'nowhere'"),
        (["EDT-Q/2", "--acceptance", "FILE"], "Unknown model 'EDT-Q/2'"),
        (["--override", "foo"], "--override takes key=value, such as token_enhancement=false; got 'foo'"),
        (["--acceptance", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_one_message(arguments: list[str], said: str, write: Any) -> None:
    path = str(write(content()))
    done = edt("cost", *(path if word == "FILE" else word for word in arguments))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_source_that_is_not_here_needs_a_number(write: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("base: imagenet256-edt-s\nname: mine\nsource: {path: /nowhere/images}\n")
    path = str(write(content()))
    missing = edt("cost", "--acceptance", path, "--config", str(own))
    assert missing.returncode == 2
    assert "/nowhere/images" in missing.stderr
    assert edt("cost", "--acceptance", path, "--config", str(own), "--num-images", "5000").returncode == 0

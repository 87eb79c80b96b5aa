"""`edt evaluate`: any model, any reference, a grid of settings; and what is refused."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.config import SampleConfig
from edt_core.errors import UserError
from edt_core.models import model_config
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.layout import EMA_WEIGHTS
from jobs.commands import evaluate_model as evaluation
from jobs.commands import export
from jobs.commands.sweep import Point, Result, check_settings, grid, parse_axis, plot, repeated_settings, results_table
from jobs.models.open import open_model
from tests.support.jobs import execute
from tests.support.models import clip_folder, made_model, opened, pipeline_folder
from tests.support.registry import write_empty_mlflow

GOLDEN = Path(__file__).parents[1] / "golden"


# --- a grid of settings


def test_a_grid_has_every_setting_once() -> None:
    axes = [parse_axis("cfg=1,1.5,2"), parse_axis("amm=off,paper,7+10")]
    points = list(grid(SampleConfig(num_samples=20), axes))
    assert [tuple(point.settings.values()) for point in points][:4] == [
        ("1", "off"),
        ("1", "paper"),
        ("1", "7+10"),
        ("1.5", "off"),
    ]
    assert [point.config.amm_blocks for point in points[:3]] == [(), "paper", (7, 10)]
    assert {point.config.cfg_scale for point in points} == {1.0, 1.5, 2.0}
    assert {point.config.num_samples for point in points} == {20}
    assert parse_axis("amm=off,model").values == ((), "model")
    interval = list(grid(SampleConfig(), [parse_axis("interval=all,200-800")]))
    assert [point.config.guidance_interval for point in interval] == [None, (200.0, 800.0)]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["scale=1,2"], "names: cfg, amm"),
        (["cfg"], "NAME=VALUE"),
        (["cfg=1,1"], "repeated"),
        (["cfg=1,2", "cfg_scale=3"], "a field twice"),
        (["cfg=0.5"], "cfg_scale"),
        (["sampler=magic"], "sampler"),
    ],
)
def test_a_grid_that_is_none_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(grid(SampleConfig(), [parse_axis(text) for text in texts]))


def points_of(*texts: str) -> list[Point]:
    return list(grid(SampleConfig(), [parse_axis(text) for text in texts]))


@pytest.mark.parametrize(
    ("model", "texts", "message"),
    [
        ("DiT-S/2", ["amm=off,model"], r"amm=off,model: both have the same effect on DiT-S/2 \(amm_blocks \[\]\)"),
        ("DiT-S/2", ["amm=paper,10+8", "cfg=1,1.5"], r"amm=paper,10\+8: .*\(amm_blocks \[8, 10\]\)"),
        ("DiT-S/2", ["radius=2,4"], r"radius=2,4: both"),  # AMM is off
        ("EDT-S/2", ["interval=all,200-800"], "interval=all,200-800: both"),  # guidance is off
        ("EDT-S/2", ["amm=99"], "99"),
        ("DiT-B/2", ["amm=off,paper"], "no placement is published for DiT-B/2"),
        ("DiT-XL/2", ["cfg=1,1.5", "amm=off,paper"], r"published for DiT-XL/2 at 256 px with cfg_scale 1\.5"),
    ],
)
def test_a_sweep_that_would_compare_a_setting_with_itself_is_refused(
    model: str, texts: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_settings(points_of(*texts), model_config(model))


def test_settings_that_are_equal_at_some_places_are_reported() -> None:
    model = model_config("EDT-S/2")
    for texts in (["cfg=1,1.5,2", "amm=off,paper"], ["amm=off,model"]):
        placed = model_config("EDT-S/2", amm_blocks=(3,))
        check_settings(points_of(*texts), placed)
        assert repeated_settings(points_of(*texts), placed) == []
    points = points_of("cfg=1,2", "amm=paper,8")
    check_settings(points, model)
    assert repeated_settings(points, model) == ["cfg=2 amm=8 has the same effect as cfg=2 amm=paper."]
    assert results_table(RESULTS, ["A note."]).endswith("\nA note.")


RESULTS = [
    Result(
        {"cfg": cfg, "amm": amm},
        {"fid": 10.0 / float(cfg) + len(amm), "fid_std": 0.25, "precision": 0.5},
        {"cfg_scale": float(cfg), "amm_blocks": amm, "seed": 0},
    )
    for cfg in ("1", "1.5", "2")
    for amm in ("off", "paper")
]


def test_a_table_of_a_grid_says_in_what_its_rows_differ() -> None:
    table = results_table(RESULTS)
    assert "| cfg | amm | fid | precision |" in table
    assert "| 1.5 | paper | 11.67 ± 0.25 | 0.5 |" in table
    assert table.endswith("The rows have the same protocol except for amm_blocks, cfg_scale.")
    assert plot(RESULTS).startswith(b"\x89PNG")
    assert plot(RESULTS) == plot(RESULTS)


# --- any model


def weights(checkpoint: Artifact) -> bytes:
    return checkpoint.path(f"{checkpoint.counts['final']}/{EMA_WEIGHTS}").read_bytes()


def test_a_model_is_the_same_in_every_form(tmp_path: Path) -> None:
    """A diffusers folder, an artifact, one of its checkpoints, and a released file with its argparse.Namespace."""
    from edt_core.config import TrainConfig
    from edt_core.training.checkpoint import checkpoint_name, write_checkpoint
    from edt_core.training.state import initial_state, to_checkpoint

    model = made_model()
    folder = pipeline_folder(tmp_path / "pipeline", model)
    first = open_model(str(folder), Folder.at(tmp_path / "a"))
    assert first.autoencoder is not None
    assert first.checkpoint.counts["autoencoder_digest"] == first.autoencoder.manifest.digest
    again = open_model(first.checkpoint.folder.uri, Folder.at(tmp_path / "b"))
    assert again.checkpoint.manifest == first.checkpoint.manifest

    config = TrainConfig(model="EDT-Tiny/2", max_steps=1)
    state = initial_state(config, model.config)
    state.model.load_state_dict(model.state_dict())
    state.ema.load([dict(model.state_dict())])
    step = tmp_path / checkpoint_name(7)
    step.mkdir()
    state.step = 7

    def write(name: str, write_to) -> object:
        write_to(step / name)
        return argparse.Namespace(sha256=__import__("hashlib").sha256((step / name).read_bytes()).hexdigest())

    write_checkpoint(to_checkpoint(state, config, 1), write)
    of_step = open_model(str(step), Folder.at(tmp_path / "c"))
    assert of_step.checkpoint.counts["steps"] == 7
    assert of_step.autoencoder is None

    released = tmp_path / "released.pt"
    arguments = argparse.Namespace(model="EDT-Tiny/2", image_size=32)
    torch.save({"model": {}, "ema": model.state_dict(), "opt": {}, "args": arguments}, released)
    of_file = open_model(str(released), Folder.at(tmp_path / "d"))
    assert weights(first.checkpoint) == weights(of_step.checkpoint) == weights(of_file.checkpoint)


def test_what_is_no_model_is_refused_with_the_forms(judge: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an artifact of kind classifier, but a model is needed"):
        open_model(judge.folder.uri, Folder.at(tmp_path / "work"))
    with pytest.raises(UserError, match=r"there is no model at .*NAME@ALIAS"):
        open_model(str(tmp_path / "nothing"), Folder.at(tmp_path / "work"))


def test_a_model_that_mlflow_does_not_have_is_refused(tmp_path: Path) -> None:
    import mlflow

    write_empty_mlflow(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    for unknown in ("edt-none@champion", f"runs:/{'0' * 32}"):
        with pytest.raises(UserError, match=f"has no model {unknown}"):
            open_model(unknown, Folder.at(tmp_path / "work"))


# --- the whole evaluation, by its command


COMMON = ["--num-samples", "12", "--unit-size", "4", "--num-sampling-steps", "3", "--num-cpus-per-worker", "0"]


def evaluate(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of the command."""
    code = 0
    try:
        evaluation.main([str(argument) for argument in arguments], "edt evaluate")
    except SystemExit as left:
        code = int(left.code or 0)
    return code, *capfd.readouterr()


@pytest.mark.usefixtures("here")
def test_a_sweep_is_measured_plotted_and_reused(
    images: Artifact, folder: Path, judge: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    call = [folder, out, "--images", images.folder.uri, "--classifier", judge.folder.uri, *COMMON, "--repeats", 2]
    code, told, errors = evaluate(capfd, *call, "--sweep", "cfg=1,3")
    assert code == 0, errors
    assert "| cfg | fd_classifier | kid_classifier |" in told
    assert "same protocol except for cfg_scale" in told
    assert "12 samples" in errors, "that few samples bias the distance is said"
    results = json.loads((out / "results.json").read_text())
    assert [result["settings"] for result in results] == [{"cfg": "1"}, {"cfg": "3"}]
    assert results[0]["metrics"]["fd_classifier"] != results[1]["metrics"]["fd_classifier"]
    assert results[0]["metrics"]["fd_classifier_std"] > 0
    protocol = results[0]["protocol"]
    stated = {"extractors", "reference", "num_samples", "label_policy", "sampler", "num_sampling_steps", "cfg_scale"}
    stated |= {"guidance_channels", "guidance_interval", "amm_blocks", "autoencoder", "uint8_rule", "precision"}
    assert stated | {"seed", "repeats", "guide", "reference_images", "amm_radius", "amm_kernel"} <= protocol.keys()
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    made = {path: path.stat().st_ino for path in out.rglob("unit-*.safetensors")}
    assert len(made) == 2 * 2 * 3
    code, again, errors = evaluate(capfd, *call, "--sweep", "cfg=1,3")
    assert (code, again) == (0, told)
    assert errors.count("reused") == 5
    assert {path: path.stat().st_ino for path in out.rglob("unit-*.safetensors")} == made


@pytest.mark.usefixtures("here")
def test_inception_against_published_statistics_and_samples_for_other_tools(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    inception = inception_weights(tmp_path)
    rng = np.random.default_rng(0)
    published = tmp_path / "VIRTUAL.npz"
    np.savez(
        published,
        arr_0=rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8),
        mu=rng.normal(size=2048),
        sigma=np.eye(2048),
        mu_s=rng.normal(size=2023),
        sigma_s=np.eye(2023),
    )
    out = tmp_path / "out"
    call = [folder, out, "--statistics", published, "--inception-weights", inception, *COMMON]
    code, _, errors = evaluate(capfd, *call)
    assert code == 2
    assert "fid needs at least 2,049 samples" in errors
    assert "there are only 12" in errors
    code, told, errors = evaluate(capfd, *call, "--allow-rank-deficient", "true", "--export", "png", "npz")
    assert code == 0, errors
    (result,) = json.loads((out / "results.json").read_text())
    assert {"fid", "sfid", "inception_score", "kid", "precision", "recall"} <= result["metrics"].keys()
    assert result["protocol"]["reference_source"] == "published statistics"
    assert "| fid |" in told
    (png,) = out.glob("samples-*-png")
    (npz,) = out.glob("samples-*.npz")
    pictures = sorted(png.iterdir())
    arrays = np.load(npz)
    assert len(pictures) == 12
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in pictures]), arrays["arr_0"])
    assert arrays["arr_1"].tolist() == [i % 4 for i in range(12)]


@pytest.mark.usefixtures("here")
def test_clip_beside_a_classifier(
    images: Artifact, folder: Path, judge: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its values are those of the features that reference and samples keep."""
    from edt_core.evaluation.metrics.cmmd import cmmd
    from edt_core.evaluation.references import load_reference
    from jobs.stages.sample import load_units

    pytest.importorskip("transformers", reason="transformers, the extra [clip], is not installed")
    out, networks = tmp_path / "out", ["--classifier", judge.folder.uri, "--clip-weights", clip_folder(tmp_path / "c")]
    call = [folder, out, "--images", images.folder.uri, *networks, *COMMON]
    code, _, errors = evaluate(capfd, *call)
    assert code == 2
    assert "fd_clip needs at least 13 samples" in errors, "12 dimensions are known from its folder"
    code, told, errors = evaluate(capfd, *call, "--metrics", "cmmd,precision")
    assert code == 0, errors
    assert "| cmmd |" in told
    (result,) = json.loads((out / "results.json").read_text())
    assert set(result["metrics"]) == {"precision_classifier", "accuracy_classifier", "precision_clip", "cmmd"}
    (features,) = (Artifact.open(path.parent) for path in out.glob("features/*/manifest.json"))
    (real,) = (Artifact.open(path.parent) for path in out.glob("reference/*/manifest.json"))
    assert set(result["protocol"]["extractors"]) == {"classifier", "clip"}
    expected = cmmd(load_units(features)["clip.features"], load_reference(real, "clip").features)
    assert result["metrics"]["cmmd"] == expected > 0


def inception_weights(folder: Path) -> Path:
    """A weights file of the public layout, with made-up weights."""
    shapes = json.loads((GOLDEN / "inception_manifest.json").read_text())
    rng = torch.Generator().manual_seed(0)
    state = {
        name: torch.zeros((), dtype=torch.int64)
        if not shape
        else torch.rand(shape, generator=rng) + 0.5
        if name.endswith(("running_var", "bn.weight"))
        else torch.randn(shape, generator=rng) * (2 / max(1, int(np.prod(shape[1:])))) ** 0.5
        for name, shape in shapes.items()
    }
    path = folder / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "pass --inception-weights for FID"),
        (["--inception-weights", "{tmp}/none.pth"], "github.com/mseitzer/pytorch-fid"),
        (["--inception-weights", "{tmp}/none.pth#sha256=beef"], "sha256 is 64 digits"),
        (["--classifier", "{classifier}"], "nothing to compare"),
        (["--classifier", "{classifier}", "--autoencoder", "{classifier}"], "but autoencoder is needed"),
        (["--classifier", "{classifier}", "--images", "a", "--statistics", "b"], "--images and --statistics are 2"),
        (["--classifier", "{classifier}", "--statistics", "{tmp}/none.npz"], "no reference statistics"),
        (["--classifier", "{classifier}", "--export", "png", "--sweep", "cfg=1,2"], "--export writes one set"),
        (["--classifier", "{classifier}", "--amm-blocks", "paper"], "no placement is published for"),
        (["--classifier", "{classifier}", "--sweep", "amm=off,paper"], "Search for a placement with `edt amm-search`"),
        (["--classifier", "{classifier}", "--sweep", "amm=off,model"], "--sweep amm=off,model: both have the same"),
        (["--classifier", "{classifier}", "--num-samples", "1"], "num_samples"),
        (["--classifier", "{classifier}", "--guidance-interval", "800,200"], "from < to"),
    ],
)
def test_what_cannot_be_evaluated_is_one_message(
    options: list[str],
    message: str,
    folder: Path,
    judge: Artifact,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    given = [option.format(tmp=tmp_path, classifier=judge.folder.uri) for option in options]
    code, _, errors = evaluate(capfd, folder, tmp_path / "out", *given)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors


def test_samples_whose_pixels_were_not_kept_are_not_exported(tmp_path: Path) -> None:
    from edt_core.config import result_fields
    from edt_core.progress import Silent
    from edt_core.store.artifact import ArtifactWriter

    out = ArtifactWriter(Folder.at(tmp_path / "features"), "features", "f" * 64)
    features = out.commit(result_fields(SampleConfig(num_samples=200)), {}, {})
    with pytest.raises(UserError, match="has the pixels of 100 of 200 samples"):
        export.export_features(features, "png", tmp_path / "png", Silent())


@pytest.mark.usefixtures("here")
def test_a_guide_and_a_prior_of_labels(judge: Artifact, tmp_path: Path) -> None:
    """Autoguidance moves the samples; a model from elsewhere knows no prior, and says so."""
    from jobs.stages import sample

    base = opened(tmp_path / "model", made_model())
    guide = opened(tmp_path / "guide", made_model(seed=1))
    assert base.autoencoder is not None
    inputs = {"checkpoint": base.checkpoint, "autoencoder": base.autoencoder, "classifier": judge}
    config = SampleConfig(num_samples=4, num_sampling_steps=3, cfg_scale=2.0, num_cpus_per_worker=0)
    plain = execute(sample.STAGE, config, tmp_path / "plain", **inputs)
    guided = execute(sample.STAGE, config, tmp_path / "guided", **inputs, guide=guide.checkpoint)
    assert plain.fingerprint != guided.fingerprint
    assert plain.manifest.digest != guided.manifest.digest
    assert guided.counts["guide_digest"] == guide.checkpoint.manifest.digest
    away = config.model_copy(update={"guidance_reference": "confused"})
    confused = execute(sample.STAGE, away, tmp_path / "confused", **inputs)
    assert confused.manifest.digest not in (plain.manifest.digest, guided.manifest.digest)
    without = {role: item for role, item in inputs.items() if role != "classifier"}
    with pytest.raises(UserError, match="there is no classifier to confuse the samples; pass --classifier"):
        execute(sample.STAGE, away.model_copy(update={"keep_images": "all"}), tmp_path / "y", **without)
    with pytest.raises(UserError, match="label_policy is prior, but the model's record has no class counts"):
        execute(sample.STAGE, config.model_copy(update={"label_policy": "prior"}), tmp_path / "x", **inputs)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("policy", ["balanced", "uniform", "prior"])
def test_no_sample_is_of_a_class_that_the_training_had_no_images_of(
    policy: str, judge: Artifact, tmp_path: Path
) -> None:
    """The counts come with the registered folder."""
    from safetensors.numpy import load_file

    from jobs.stages import sample

    folder = pipeline_folder(tmp_path / "pipeline", made_model(), class_counts=[3, 0, 2, 9])
    model = open_model(str(folder), Folder.at(tmp_path / "work"))
    assert model.autoencoder is not None
    inputs = {"checkpoint": model.checkpoint, "autoencoder": model.autoencoder, "classifier": judge}
    config = SampleConfig(num_samples=24, num_sampling_steps=2, label_policy=policy, num_cpus_per_worker=0)
    made = execute(sample.STAGE, config, tmp_path / "samples", **inputs)
    labels = np.concatenate([load_file(path)["labels"] for path in made.paths(sample.FEATURE_UNITS)])
    assert len(labels) == 24
    assert set(labels.tolist()) <= {0, 2, 3}


def test_one_unit_is_sampled_while_the_one_before_is_finished(tmp_path: Path) -> None:
    """The first unit's end waits for the beginning of the second one: apart they would wait for ever."""
    import threading
    from concurrent.futures import ThreadPoolExecutor

    from edt_core.store.artifact import ArtifactWriter
    from jobs.stages.sample import Sampler, Unit

    second_began = threading.Event()

    class Staged(Sampler):
        def __init__(self) -> None:
            self.config = SampleConfig(num_samples=8, unit_size=4)
            self.out = ArtifactWriter(Folder.at(tmp_path), "features", "f" * 64)
            self._sampling, self._finishing = threading.Lock(), threading.Lock()
            self.device, self.folder = "cpu", ""

        def _draw(self, unit: Unit) -> tuple[np.ndarray, None]:
            if unit.indices[0] == 4:
                second_began.set()
            return unit.indices, None

        def _tensors(self, unit: Unit, labels: np.ndarray, latents: None) -> dict[str, np.ndarray]:
            assert unit.indices[0] == 4 or second_began.wait(30), "the stages do not overlap"
            return {"indices": unit.indices}

    sampler = Staged()
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(sampler.work, range(2))) == [(4, "cpu"), (4, "cpu")]
    assert len(list(tmp_path.glob("unit-*.safetensors"))) == 2

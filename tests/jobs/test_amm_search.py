"""`edt amm-search`: what is found where something is to be found, and that noise is not sold as a gain."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from edt_core.config import ChainConfig
from edt_core.sampling.sampler import LatentSampler
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.folder import Folder
from edt_core.store.layout import EMA_WEIGHTS, MODEL_CONFIG
from jobs.commands import amm_search
from jobs.commands import evaluate_model as evaluation
from jobs.commands.amm_search import Placement, SearchConfig, paired_gain, search, settings
from jobs.models.derived import write_modulated
from jobs.models.open import open_model
from jobs.stages.sample import averaged_model
from tests.support.models import TINY, made_model, opened

Effect = Callable[[Placement], float]


def measured(effect: Effect, noise: float, seed: int = 0, repeats: int = 4) -> amm_search.Measure:
    """Distances around 10 that all placements share, less an effect, with noise of each placement's own."""
    rng = np.random.default_rng(seed)

    def measure(placement: Placement, fresh: bool) -> Sequence[float]:
        common = np.random.default_rng(int(fresh)).normal(10, 3, repeats)  # of the labels and noise: the same for all
        return list(common - effect(placement) + noise * rng.normal(size=repeats))

    return measure


def no_radii(placement: Placement) -> Sequence[Placement]:
    return ()


def test_a_placement_that_is_better_is_found_in_stages() -> None:
    """Blocks 2 and 5 help, most of all together and within 6 tokens; seeds differ by more than all that."""
    helpful = {2: 1.0, 5: 0.8, 3: -2.0}

    def effect(placement: Placement) -> float:
        gain = sum(helpful.get(block, -0.1) for block in placement.blocks)
        return gain + (0.5 if placement.radius == 6 else 0.0)

    found = search(
        measured(effect, 0.05), range(7), lambda best: [Placement(best.blocks, 3.0), Placement(best.blocks, 6.0)], top=3
    )
    assert found.chosen == Placement((2, 5), 6.0)
    stages = [trial.stage for trial in found.trials]
    assert stages == ["off", *["blocks"] * 7, *["pairs"] * 3, *["radii"] * 2, *["confirm"] * 2]
    assert len(stages) == settings(7, 2, 3)
    gain = found.trials[-1].gain
    assert gain is not None
    assert gain.mean == pytest.approx(2.3, abs=0.2), "paired: what the seeds share is no part of the error"
    assert gain.error < 0.1


def test_noise_is_hardly_ever_a_gain() -> None:
    """Of 200 searches among 10 useless blocks, nearly all have one that looks better than off, and few take it."""
    taken = looked_better = 0
    for seed in range(200):
        found = search(measured(lambda placement: 0.0, 1.0, seed), range(10), no_radii, top=3)
        taken += found.chosen != Placement()
        looked_better += found.trials[-1].stage == "confirm"
    assert looked_better > 180
    assert taken <= 20  # 5 % of 200 are 10


def test_where_all_is_worse_amm_stays_off_and_nothing_is_confirmed() -> None:
    found = search(measured(lambda placement: -5.0 * bool(placement.blocks), 0.1), range(4), no_radii, top=1)
    assert found.chosen == Placement()
    assert [trial.stage for trial in found.trials] == ["off", *["blocks"] * 4]
    assert "no placement is better" in found.reason


def test_a_gain_is_the_mean_of_pairs_with_its_error() -> None:
    off, values = [10.0, 20.0, 30.0], [9.0, 18.0, 27.0]
    gain = paired_gain(off, values)
    assert gain.mean == pytest.approx(fmean(off) - fmean(values))
    assert gain.error == pytest.approx(1 / 3**0.5)
    assert gain.least == pytest.approx(2.92 / 3**0.5)  # Student's t with 2 degrees of freedom
    assert gain.real
    assert not paired_gain(values, off).real
    assert paired_gain(off, values).mean == -paired_gain(values, off).mean


def test_the_protocol_of_a_placement_is_the_search_s_but_for_amm_and_seed() -> None:
    config = SearchConfig(cfg_scale=1.5, num_samples=30)
    one, other = config.sampling(Placement(), 3), config.sampling(Placement((1, 2), 4.0), 3)
    assert other.amm_blocks == (1, 2)
    assert other.amm_radius == 4.0
    assert config.sampling(Placement((1, 2), rows=1), 3).amm_radius_rows == 1
    assert one == other.model_copy(update={"amm_blocks": (), "amm_radius": None})
    assert (one.cfg_scale, one.num_samples, one.repeats, one.seed) == (1.5, 30, 4, 3)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("radius", [{"amm_radius": 2.0}, {"amm_radius": None, "amm_radius_rows": 0}])
def test_a_model_is_sampled_with_the_placement_that_was_written_into_it(
    name: str, radius: dict[str, Any], tmp_path: Path
) -> None:
    source = opened(tmp_path, made_model(name=name))
    amm = {"amm_blocks": [1, 4], **radius, "amm_kernel": "cos"}
    out = ArtifactWriter(Folder.at(tmp_path / "found"), "checkpoint", "f" * 64)
    made = out.commit(source.checkpoint.manifest.config, {}, write_modulated(source, amm, out))
    found = open_model(made.folder.uri, Folder.at(tmp_path / "work"))
    samplers = [
        LatentSampler(averaged_model(opened.checkpoint, "cpu"), chain, 1000)
        for opened, chain in (
            (found, ChainConfig(num_sampling_steps=2, amm_blocks="model")),
            (source, ChainConfig(num_sampling_steps=2, amm_blocks=(1, 4), **radius, amm_kernel="cos")),
            (source, ChainConfig(num_sampling_steps=2)),
        )
    ]
    by_model, by_chain, without = (sampler([0, 1], 0, [0, 1]) for sampler in samplers)
    assert torch.equal(by_model, by_chain)
    assert not torch.equal(by_model, without)


# --- by its command


def called(main: Callable[..., None], capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    return code, *capfd.readouterr()


SAMPLING = ["--num-samples", "12", "--unit-size", "12", "--num-sampling-steps", "2", "--num-cpus-per-worker", "0"]


@pytest.mark.usefixtures("here")
def test_what_is_found_is_a_model_that_is_evaluated_with_it(
    images: Artifact, folder: Path, judge: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    common = ["--images", images.folder.uri, "--classifier", judge.folder.uri, *SAMPLING]
    call = [folder, out, *common, "--repeats", 2, "--blocks", "1,4", "--top", 1, "--radii", "2", "--radius-rows", "0"]
    code, told, errors = called(amm_search.main, capfd, *call)
    assert code == 0, errors
    assert "up to 7 settings of 2 x 12 samples, 168 samples in all" in errors
    assert "| off | off |" in told
    assert "| blocks | 4 |" in told
    assert ", radius rows 0 |" in told
    results = json.loads((out / "results.json").read_text())
    assert results["metric"] == "kid_classifier"
    values = {trial["placement"]: trial["value"] for trial in results["trials"]}
    assert len(set(values.values())) == len(values), "modulation in other blocks makes other samples"

    work = Folder.at(tmp_path / "work")
    found, source = open_model(str(out), work), open_model(str(folder), work)
    final = found.checkpoint.counts["final"]
    config = found.checkpoint.read_json(f"{final}/{MODEL_CONFIG}")
    assert config["amm_blocks"] == results["amm_blocks"] == found.checkpoint.counts["amm_search"]["amm_blocks"]
    same = [opened.checkpoint.path(f"{final}/{EMA_WEIGHTS}").read_bytes() for opened in (found, source)]
    assert same[0] == same[1]
    assert found.autoencoder is not None, "it is found again beside what was searched"
    code, _, errors = called(evaluation.main, capfd, out, tmp_path / "evaluation", *common)
    assert code == 0, errors

    code, again, errors = called(amm_search.main, capfd, *call)
    assert (code, again) == (0, told), errors
    code, _, errors = called(amm_search.main, capfd, *call, "--seed", 5)
    assert code == 2
    assert "another configuration" in errors


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "3,7"], "the model has 7 blocks; use blocks of 0..6"),
        (["--metric", "precision_classifier"], "cannot decide"),
        (["--repeats", "1"], "repeats"),
    ],
)
def test_what_cannot_be_searched_is_one_message(
    options: list[str],
    message: str,
    images: Artifact,
    folder: Path,
    judge: Artifact,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    common = ["--images", images.folder.uri, "--classifier", judge.folder.uri, *SAMPLING]
    call = [folder, tmp_path / "out", *common, *options]
    code, _, errors = called(amm_search.main, capfd, *call)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors

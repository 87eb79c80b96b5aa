"""`edt bench eval`: what it compares is equal, and what it prints is whole. No times."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from edt_core.acceptance.authors import plain_model
from edt_core.diffusion import SampleNoise, linear_schedule, sampling_schedule
from edt_core.evaluation.extractors.inception import Inception, inception_network
from edt_core.sampling.sampler import LatentSampler
from jobs.benchmark import command, evaluate, metrics
from jobs.benchmark.evaluate import bench_eval
from jobs.benchmark.networks import EvalSubject, Networks, chain_config, made_networks
from jobs.benchmark.plain import PlainChain, PlainEvaluation
from jobs.benchmark.table import Row

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SUBJECT = EvalSubject(
    "EDT-Tiny/2", 64, batch_size=2, num_images=2, unit_size=1, steps=2, autoencoder_channels=(32, 32, 32, 32)
)


@pytest.fixture(scope="module")
def networks() -> Networks:
    return made_networks(SUBJECT)


def test_the_plain_chain_is_ours(networks: Networks) -> None:
    """The same latents from the same noise, which the plain chain takes for both halves."""
    chain, labels, indices = chain_config("fp32", 5), [3, 1, 2], [0, 5, 9]
    ours = LatentSampler(networks.model, chain, 1000)(labels, 7, indices)
    schedule = sampling_schedule(linear_schedule(1000), chain.num_sampling_steps)
    noise = SampleNoise(7, indices, tuple(ours.shape[1:]))
    draws = iter([*map(noise, range(chain.num_sampling_steps - 1)), torch.zeros_like(ours)])
    plain = PlainChain(plain_model(networks.model).eval(), schedule)
    theirs = plain(noise.initial(), torch.tensor(labels), draw=lambda x: next(draws).repeat(2, 1, 1, 1))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4 * float(ours.std()))


def test_the_plain_features_are_ours(networks: Networks, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    plain = PlainEvaluation(tmp_path, SUBJECT, networks, CPU).features(pixels)
    ours = Inception(inception_network(networks.inception.state_dict()))(pixels)["features"]
    assert ours.std() > 1e-3
    np.testing.assert_allclose(plain, ours, rtol=1e-3, atol=1e-4)


def test_every_row_is_measured(tmp_path: Path) -> None:
    rows = [row for part in bench_eval(tmp_path, SUBJECT, turns=1) for row in part]
    assert [" ".join(row.what.split()[:2]) for row in rows] == [
        *["sampling, fp32,", "sampling, bf16,", "both halves", "sampling, fp32,", "sampling, bf16,"],
        *["whole evaluation,"] * 4,
    ]
    for row in rows:
        assert row.ratio is not None, row
        assert math.isfinite(row.ratio), row
        assert row.ratio > 0, row
        assert "nan" not in row.figure + row.against, row
        assert row.against, row
    assert [row.target for row in rows[5:]] == ["", "", "at least 1.5", "at least 1.5"]
    assert len(list(tmp_path.glob("fp32/*/unit-*.safetensors"))) == 2
    assert len(list(tmp_path.glob("plain/1/*.png"))) == 2


def test_the_command_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[EvalSubject] = []

    def measured(work: Path, subject: EvalSubject, turns: int) -> list[list[Row]]:
        seen.append(subject)
        return [[Row("sampling", "1", "bare", 1.0)]]

    monkeypatch.setattr(evaluate, "bench_eval", measured)
    monkeypatch.setattr(metrics, "bench_metrics", lambda scale: [Row(f"metrics {scale:g}", "1 s")])
    command.main(["eval", "--model", "EDT-Tiny/2", "--image-size", "64", "--num-images", "20", "--scale", "0.5"])
    assert "| sampling | 1 | bare | 1.00 |  |\n| metrics 0.5 | 1 s |" in capsys.readouterr().out
    assert (seen[0].model, seen[0].image_size, seen[0].num_images) == ("EDT-Tiny/2", 64, 10)

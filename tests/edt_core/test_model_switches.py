"""The switches of EDT's ablations against its authors' code, and what a configuration may set of a named model."""

from __future__ import annotations

import json
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from edt_core.config import AmmPreset, ChainConfig, TrainConfig
from edt_core.errors import UserError
from edt_core.models import (
    EDT,
    EDTConfig,
    MDTv2Config,
    ModelConfig,
    amm_matrix,
    chosen_amm_blocks,
    count_macs,
    draw_masks,
    model_config,
    overrides_record,
    shadow,
    with_trained_amm,
)
from edt_core.models.attention import Attention, RelativePositionBias
from jobs.commands.sweep import parse_axis
from tests.support.golden import GOLDEN, formula_weight, relative_error

TOLERANCE = 1e-5
SIZE: dict[str, Any] = {"depths": (5, 1, 1, 1, 1), "dims": (16, 24, 32, 24, 16), "num_heads": (2, 3, 4, 3, 2)}
MANIFEST = json.loads((GOLDEN / "edt_switches_manifest.json").read_text())


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "edt_switches.npz") as file:
        return dict(file)


def reference_model(**fields: Any) -> EDT:
    model = EDT(EDTConfig(name="narrow", latent_size=16, num_classes=10, **{**SIZE, **fields}))
    state = {
        key: value if key.endswith("pos_embed") else formula_weight(key, value.shape)
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = np.random.RandomState(0).randn(2, 4, 16, 16).astype(np.float32)
    return torch.from_numpy(x), torch.tensor([17, 903]), torch.tensor([3, 10])


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("plain", {}),
        ("without_enhancement", {"token_enhancement": False}),
        ("without_supplement", {"position_supplement": False}),
        ("without_both", {"token_enhancement": False, "position_supplement": False}),
    ],
)
@torch.no_grad()
def test_down_sampling_without_its_parts(name: str, fields: dict[str, bool], golden: dict[str, np.ndarray]) -> None:
    assert relative_error(reference_model(**fields)(*inputs()), golden[name]) < TOLERANCE


@torch.no_grad()
def test_masks_within_the_first_stage_and_in_the_down_sampling(golden: dict[str, np.ndarray]) -> None:
    model = reference_model(mid_mask_block=4)
    masks = [torch.from_numpy(golden[f"uniform_{site}"] >= ratio) for site, ratio in enumerate(golden["ratios"])]
    assert relative_error(model(*inputs(), masks), golden["masked"]) < TOLERANCE


@torch.no_grad()
def test_masks_at_the_input_alone(golden: dict[str, np.ndarray]) -> None:
    model = reference_model(input_mask_ratio=(0.3, 0.5), down_mask_ratios=())
    keep = torch.from_numpy(golden["uniform_input"] >= 0.4)
    assert relative_error(model(*inputs(), [keep]), golden["masked_at_input"]) < TOLERANCE
    (drawn,) = draw_masks(model.config, 500, torch.Generator().manual_seed(0))
    assert 0.3 - 0.02 < 1 - float(drawn.float().mean()) < 0.5 + 0.02


@torch.no_grad()
def test_masks_at_the_input_come_before_the_others() -> None:
    model = reference_model(input_mask_ratio=(0.3, 0.5), mid_mask_block=2)
    assert [site.module for site in model.config.mask_sites] == [
        "x_embedder",
        "blocks.2",
        "down_blocks.0",
        "down_blocks.1",
    ]
    ones = [torch.ones(2, site.tokens, dtype=torch.bool) for site in model.config.mask_sites]
    assert torch.equal(model(*inputs(), ones), model(*inputs()))
    for site in range(len(ones)):
        masks = [mask.clone() for mask in ones]
        masks[site][:, 3] = False
        assert not torch.equal(model(*inputs(), masks), model(*inputs()))


def test_without_any_site_a_model_has_no_masked_pass() -> None:
    config = model_config("EDT-S/2", overrides={"down_mask_ratios": []})
    assert not config.is_masked
    assert draw_masks(config, 2, torch.Generator()) == []


def test_parts_that_are_left_out_have_no_weights_and_no_cost() -> None:
    full, dims = model_config("EDT-S/2"), (312, 416)
    bare = model_config("EDT-S/2", overrides={"token_enhancement": False, "position_supplement": False})
    names = [set(shadow(config).state_dict()) for config in (full, bare)]
    left_out = ("pos_embed", "adaLN_modulation.1.weight", "adaLN_modulation.1.bias")
    assert names[0] - names[1] == {f"down_blocks.{i}.{part}" for i in range(2) for part in left_out}
    assert names[1] < names[0]
    assert count_macs(shadow(full)) - count_macs(shadow(bare)) == 312 * 8 * sum(dims)


class TestModulation:
    @pytest.mark.parametrize(("grid", "rows"), [(4, 9), *((grid, r * r) for grid in (8, 16) for r in range(5))])
    def test_the_radius_follows_from_the_grid(self, grid: int, rows: int, golden: dict[str, np.ndarray]) -> None:
        matrix = amm_matrix(grid, radius_rows=rows)
        np.testing.assert_allclose(matrix.sum(1).numpy(), golden[f"amm_{grid}_{rows}"], rtol=1e-6)
        assert torch.equal(matrix, amm_matrix(grid)) == (rows == 4)
        assert torch.equal(matrix, amm_matrix(grid, radius=((grid - 1) ** 2 + rows + 0.5) ** 0.5))

    def test_in_training_it_is_what_the_authors_code_computes_in_evaluation(
        self, golden: dict[str, np.ndarray]
    ) -> None:
        model = reference_model(amm_blocks=(7,), amm_in_training=True).train()
        output = model(*inputs())
        assert relative_error(output, golden["modulated"]) < TOLERANCE
        output.square().mean().backward()
        norms = {key: float(p.grad.norm()) for key, p in model.named_parameters() if p.grad is not None}
        assert norms == pytest.approx(MANIFEST["gradient_norms"], rel=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(*inputs()), output.detach(), rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_otherwise_it_acts_in_evaluation_alone(self, golden: dict[str, np.ndarray]) -> None:
        model = reference_model(amm_blocks=(7,))
        assert relative_error(model(*inputs()), golden["modulated"]) < TOLERANCE
        assert relative_error(model.train()(*inputs()), golden["plain"]) < TOLERANCE

    @pytest.mark.parametrize("with_bias", [True, False])
    def test_tokens_that_are_left_are_modulated_by_their_positions(self, with_bias: bool) -> None:
        """As among all tokens where a masked one cannot be attended to."""
        torch.manual_seed(0)
        attention = Attention(8, 2, 4, RelativePositionBias(4, 2) if with_bias else None)
        for parameter in attention.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        attention.set_amm("exp_cos", radius_rows=0)
        indices = torch.tensor([[0, 3, 5, 12, 15], [1, 2, 3, 8, 14]])
        x = torch.randn(2, 16, 8)
        kept = x.gather(1, indices.unsqueeze(-1).expand(-1, -1, 8))
        plain = attention.train()(kept, indices)
        attention.amm_in_training = True
        q, k, v = attention.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / 2 + (0 if attention.rel_pos_bias is None else attention.rel_pos_bias())
        hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, indices, False)
        weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1) * amm_matrix(4, radius_rows=0)
        whole = attention.proj((weights @ v).transpose(1, 2).flatten(2))
        expected = whole.gather(1, indices.unsqueeze(-1).expand(-1, -1, 8))
        for mode in (True, False):
            torch.testing.assert_close(attention.train(mode)(kept, indices), expected)
        assert not torch.allclose(plain, expected)

    def test_its_fields_are_stored_only_if_set(self) -> None:
        config = with_trained_amm(model_config("EDT-S/2"), "paper")
        assert (config.amm_blocks, config.amm_in_training) == ((7, 10), True)
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert with_trained_amm(model_config("EDT-S/2"), ()) == model_config("EDT-S/2")
        assert not {"amm_in_training", "amm_radius_rows"} & set(model_config("EDT-S/2").to_dict())

    @pytest.mark.parametrize(
        ("fields", "problem"),
        [({"amm_radius_rows": -1}, "amm_radius_rows is -1"), ({"amm_radius_rows": 1, "amm_radius": 2.0}, "both set")],
    )
    def test_a_radius_that_is_none(self, fields: dict[str, Any], problem: str) -> None:
        with pytest.raises(UserError, match=problem):
            reference_model(**fields)


class TestPlacements:
    @pytest.mark.parametrize("name", ["EDT-S/2", "EDT-B/2"])
    def test_parts_of_an_hourglass(self, name: str) -> None:
        config = model_config(name)
        chosen = {preset: chosen_amm_blocks(config, preset, 1.0) for preset in config.amm_presets}
        assert chosen == {
            "every_block": tuple(range(12)),
            "encoder": (0, 1, 2, 3, 4, 5),
            "decoder": (6, 7, 8, 9, 10, 11),
            "alternating": (7, 10),
        }
        assert chosen["alternating"] == chosen_amm_blocks(config, "paper", 1.0)

    def test_parts_of_other_models(self) -> None:
        large = model_config("EDT-XL/2")
        assert chosen_amm_blocks(large, "alternating", 1.0) == (15, 17, 19, 22, 24, 26)
        assert chosen_amm_blocks(model_config("MDTv2-S/2"), "decoder", 1.0) == tuple(range(6, 12))
        assert chosen_amm_blocks(model_config("DiT-S/2"), "every_block", 1.0) == tuple(range(12))
        assert set(get_args(AmmPreset)) == set(large.amm_presets)
        with pytest.raises(UserError, match="'decoder', but DiT-S/2 has no such part; use every_block, paper, model"):
            chosen_amm_blocks(model_config("DiT-S/2"), "decoder", 1.0)

    @pytest.mark.parametrize(
        ("name", "scale", "blocks"),
        [
            ("DiT-XL/2", 1.0, (15, 17, 19, 22, 24)),
            ("DiT-S/2", 1.0, (8, 10)),
            ("DiT-S/2", 1.5, (8, 10)),
            ("MDTv2-S/2", 1.0, (8,)),
            ("MDTv2-S/2", 3.8, (8,)),
        ],
    )
    def test_published_for_other_families(self, name: str, scale: float, blocks: tuple[int, ...]) -> None:
        assert chosen_amm_blocks(model_config(name), "paper", scale) == blocks

    def test_a_training_and_a_sweep_take_them_by_name(self) -> None:
        config = with_trained_amm(model_config("EDT-S/2"), "decoder")
        assert (config.amm_blocks, config.amm_in_training) == (tuple(range(6, 12)), True)
        assert TrainConfig(amm_blocks="decoder").amm_blocks == ChainConfig(amm_blocks="decoder").amm_blocks == "decoder"
        axis = parse_axis("amm=off,alternating,every_block,7+10")
        assert axis.values == ((), "alternating", "every_block", (7, 10))


class TestOverrides:
    def test_they_are_stored_and_recorded(self) -> None:
        overrides = {"token_enhancement": False, "down_mask_ratios": [[0.1, 0.2], [0.3, 0.4]], "mid_mask_block": 1}
        config = model_config("EDT-S/2", overrides=overrides)
        assert isinstance(config, EDTConfig)
        assert config.down_mask_ratios == ((0.1, 0.2), (0.3, 0.4))
        assert overrides_record(config) == {"model_overrides": overrides}
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_the_defaults_of_a_model_are_no_overrides(self) -> None:
        config = model_config("EDT-XL/2", overrides={"mid_mask_block": 4, "position_supplement": True})
        assert config == model_config("EDT-XL/2")
        assert config.to_dict() == model_config("EDT-XL/2").to_dict()
        assert not {"token_enhancement", "position_supplement", "input_mask_ratio"} & set(config.to_dict())
        assert overrides_record(config) == {}

    def test_a_model_may_lose_a_site_that_its_size_has(self) -> None:
        config = model_config("EDT-XL/2", overrides={"mid_mask_block": None})
        assert overrides_record(config) == {"model_overrides": {"mid_mask_block": None}}
        assert len(config.mask_sites) == 2

    def test_other_families(self) -> None:
        config = model_config("MDTv2-S/2", overrides={"mask_ratio": [0.1, 0.2], "decode_depth": 2})
        assert isinstance(config, MDTv2Config)
        assert (config.mask_ratio, config.decode_depth) == ((0.1, 0.2), 2)

    @pytest.mark.parametrize(
        ("name", "overrides", "problem"),
        [
            (
                "EDT-S/2",
                {"dims": [1]},
                "dims for EDT-S/2, but a model of EDT takes depths, token_enhancement, .*input_mask",
            ),
            ("DiT-S/2", {"token_enhancement": False}, "a model of DiT takes depth;"),
            ("MaskGIT-Tiny", {"depth": 3}, "a model of MaskGIT takes none"),
            ("MDTv2-S/2", {"mid_mask_block": 1}, "takes mask_ratio, depth, decode_depth"),
            ("MDTv2-S/2", {"depth": 11}, "leave an even number, at least 2"),
            ("EDT-S/2", {"token_enhancement": "maybe"}, "token_enhancement of EDT-S/2 is 'maybe': input should be"),
            ("EDT-S/2", {"input_mask_ratio": [0.5, 0.3]}, r"mask ratios 0\.5\.\.0\.3"),
            ("EDT-S/2", {"down_mask_ratios": [[0.1, 0.2]]}, "set one range for each, or none at all"),
        ],
    )
    def test_what_is_refused(self, name: str, overrides: dict[str, Any], problem: str) -> None:
        with pytest.raises(ValueError, match=problem):
            model_config(name, overrides=overrides)

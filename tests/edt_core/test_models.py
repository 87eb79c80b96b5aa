"""Properties of EDT that hold for any weights: configuration, tokens, forward pass, AMM, masking, cost."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from edt_core.errors import UserError
from edt_core.models import (
    DIFFUSION_NAMES,
    EDT,
    MODEL_NAMES,
    ModelConfig,
    amm_matrix,
    count_macs,
    create_model,
    draw_mask_ratios,
    draw_masks,
    has_paper_amm_blocks,
    mask_sites,
    model_config,
    paper_amm_blocks,
    slice_masks,
)
from edt_core.models.layers import merge_tokens, split_tokens
from edt_core.models.zoo import AMM_PLACEMENTS

CLASSES = 10


def tiny(amm_blocks: tuple[int, ...] = (), image_size: int = 32) -> EDT:
    """A tiny EDT with weights drawn at random everywhere, so that no gate hides a block."""
    model = create_model("EDT-Tiny/2", image_size, CLASSES, amm_blocks)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def batch(model: EDT, size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    side = model.config.latent_size
    x = torch.randn(size, 4, side, side, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(size) * 300, torch.arange(size)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestConfig:
    @pytest.mark.parametrize("name", MODEL_NAMES)
    def test_survives_json(self, name: str) -> None:
        config = model_config(name, 512, 7, amm_blocks=(1, 2) if name in DIFFUSION_NAMES else ())
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_a_dictionary_of_an_older_version_is_read(self) -> None:
        values = model_config("EDT-S/2").to_dict()
        del values["amm_radius"]
        assert ModelConfig.from_dict(values) == model_config("EDT-S/2")

    def test_rejects_keys_it_does_not_know(self) -> None:
        values = model_config("EDT-S/2").to_dict() | {"depth": 12}
        with pytest.raises(ValueError, match=r"unknown keys \['depth'\]"):
            ModelConfig.from_dict(values)

    def test_rejects_missing_keys(self) -> None:
        with pytest.raises(ValueError, match=r"missing keys .*'latent_size'"):
            ModelConfig.from_dict({"name": "EDT-S/2"})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"depths": (2, 2, 2)}, "same odd number"),
            ({"depths": (2,), "dims": (312,), "num_heads": (6,)}, "3 or more"),
            ({"dims": (312, 416, 520, 416, 416)}, "same from both ends"),
            ({"num_heads": (7, 8, 10, 8, 6)}, "width 312 with 7 heads"),
            ({"num_classes": 0}, "num_classes is 0"),
            ({"amm_kernel": "gauss"}, "unknown amm_kernel 'gauss'"),
            ({"down_mask_ratios": ((0.4, 0.5),)}, "1 ranges in down_mask_ratios"),
            ({"down_mask_ratios": ((0.5, 0.4), (0.1, 0.2))}, r"mask ratios 0\.5\.\.0\.4"),
            ({"mid_mask_block": 2}, r"blocks 0\.\.1"),
        ],
    )
    def test_rejects_numbers_that_make_no_model(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            replace(model_config("EDT-S/2"), **change)

    def test_unknown_name_lists_the_known_ones(self) -> None:
        with pytest.raises(ValueError, match=r"'EDT-L/2'.*EDT-S/2, EDT-B/2, EDT-XL/2, EDT-Tiny/2"):
            create_model("EDT-L/2")

    @pytest.mark.parametrize("image_size", [250, 272, 0, 16])
    def test_image_size_that_does_not_fit_names_one_that_does(self, image_size: int) -> None:
        with pytest.raises(ValueError, match="multiple of 64"):
            model_config("EDT-S/2", image_size)

    def test_amm_block_out_of_range(self) -> None:
        with pytest.raises(ValueError, match=r"\[12\] do not exist.*0\.\.11"):
            model_config("EDT-S/2", amm_blocks=(7, 12))

    def test_stages_of_the_extra_large_model(self) -> None:
        stages = model_config("EDT-XL/2").stages
        assert [stage.grid for stage in stages] == [16, 8, 4, 8, 16]
        assert [block for stage in stages for block in stage.blocks] == list(range(28))


class TestTokens:
    def test_split_mirrors_merge(self) -> None:
        """Splitting what was merged transposes each 2x2 cell; doing so twice gives the tokens back."""
        x = torch.arange(2 * 16 * 3.0).reshape(2, 16, 3)
        once = split_tokens(merge_tokens(x, 4), 2)
        cells = x.reshape(2, 2, 2, 2, 2, 3)  # N, row, row in cell, column, column in cell, C
        assert torch.equal(once, cells.transpose(2, 4).reshape(2, 16, 3))
        assert torch.equal(split_tokens(merge_tokens(once, 4), 2), x)

    def test_order_within_a_cell(self) -> None:
        square = torch.tensor([[[0.0], [1.0], [2.0], [3.0]]])  # row-major: (0,0), (0,1), (1,0), (1,1)
        assert merge_tokens(square, 2).flatten().tolist() == [0, 2, 1, 3]
        assert split_tokens(torch.arange(4.0).reshape(1, 1, 4), 1).flatten().tolist() == [0, 1, 2, 3]


class TestForward:
    @pytest.mark.parametrize("image_size", [32, 64])
    def test_shape(self, image_size: int) -> None:
        model = tiny(image_size=image_size)
        side = image_size // 4
        assert model(*batch(model)).shape == (3, 8, side, side)

    def test_other_autoencoder(self) -> None:
        model = create_model("EDT-Tiny/2", 128, CLASSES, autoencoder_factor=16, latent_channels=16).eval()
        x = torch.randn(1, 16, 8, 8)
        assert model(x, torch.tensor([5.5]), torch.tensor([CLASSES])).shape == (1, 32, 8, 8)

    def test_starts_at_zero(self) -> None:
        model = create_model("EDT-Tiny/2", 32, CLASSES)
        assert model(*batch(model)).count_nonzero() == 0

    def test_samples_do_not_see_each_other(self) -> None:
        model = tiny()
        x, t, y = batch(model)
        torch.testing.assert_close(model(x, t, y)[1:2], model(x[1:2], t[1:2], y[1:2]), rtol=1e-4, atol=1e-5)

    def test_draws_no_random_numbers(self) -> None:
        model = tiny().train()
        state = torch.get_rng_state()
        first, second = model(*batch(model)), model(*batch(model))
        assert torch.equal(first, second)
        assert torch.equal(torch.get_rng_state(), state)

    def test_position_embeddings_are_saved_but_not_trained(self) -> None:
        model = tiny()
        saved = {key for key in model.state_dict() if key.endswith("pos_embed")}
        assert len(saved) == 5
        assert saved.isdisjoint(key for key, _ in model.named_parameters())

    @torch.no_grad()
    def test_autocast_stays_close(self) -> None:
        model = tiny((0, 2))
        exact = model(*batch(model))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(*batch(model))
        assert rounded.isfinite().all()
        torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.05 * float(exact.abs().max()))

    def test_bfloat16_model(self) -> None:
        model = tiny((0,)).bfloat16()
        x, t, y = batch(model)
        assert model(x.bfloat16(), t, y, draw_masks(model.config, 3, seeded())).dtype == torch.bfloat16

    @pytest.mark.parametrize("shape", [(3, 4, 16, 16), (3, 3, 8, 8), (4, 8, 8)])
    def test_wrong_latents(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"takes latents of shape \[N, 4, 8, 8\]"):
            tiny()(torch.zeros(shape), torch.zeros(3), torch.zeros(3, dtype=torch.long))

    def test_wrong_labels(self) -> None:
        model = tiny()
        x, t, y = batch(model)
        with pytest.raises(ValueError, match=r"batch of 3, t and y must.*\[3\] and \[2\]"):
            model(x, t, y[:2])

    def test_training_step_reaches_every_parameter(self) -> None:
        model = tiny().train()
        model(*batch(model), masks=draw_masks(model.config, 3, seeded())).square().mean().backward()
        still = [key for key, p in model.named_parameters() if p.grad is None or p.grad.norm() == 0]
        # At 32 pixels the middle stage has one token, and a softmax over one score has no slope.
        one_token = ("blocks.3.attn.rel_pos_bias.relative_position_bias_table",)
        assert tuple(still) == one_token

    def test_fits_one_batch(self) -> None:
        torch.manual_seed(0)
        model = create_model("EDT-Tiny/2", 32, CLASSES)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        x, t, y = batch(model)
        losses = []
        for _ in range(40):
            loss = (model(x, t, y)[:, :4] - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.2 * losses[0]


class TestAmm:
    def test_acts_in_evaluation_only(self) -> None:
        plain, modulated = tiny(), tiny((0, 2))
        assert not torch.allclose(plain(*batch(plain)), modulated(*batch(plain)), rtol=1e-3)
        assert torch.equal(plain.train()(*batch(plain)), modulated.train()(*batch(plain)))

    def test_set_after_construction_equals_set_at_construction(self) -> None:
        model, modulated = tiny(), tiny((0, 2))
        before = model(*batch(model))
        model.set_amm((0, 2))
        assert torch.equal(model(*batch(model)), modulated(*batch(model)))
        assert model.config == modulated.config
        model.set_amm(())
        assert torch.equal(model(*batch(model)), before)

    def test_refused_blocks_leave_amm_as_it_was(self) -> None:
        model = tiny((2,))
        before = model(*batch(model))
        with pytest.raises(ValueError, match=r"\[7, -1\] do not exist"):
            model.set_amm((0, 7, -1))
        assert model.config.amm_blocks == (2,)
        assert torch.equal(model(*batch(model)), before)

    def test_leaves_no_trace_in_the_state_dict_and_survives_a_copy(self) -> None:
        model = tiny((0, 2))
        assert model.state_dict().keys() == tiny().state_dict().keys()
        assert torch.equal(copy.deepcopy(model)(*batch(model)), model(*batch(model)))

    @pytest.mark.parametrize("kernel", ["exp_cos", "cos"])
    @pytest.mark.parametrize("grid", [1, 2, 5, 32])
    def test_matrix_falls_with_distance(self, grid: int, kernel: str) -> None:
        matrix = amm_matrix(grid, kernel)  # type: ignore[arg-type]
        peak = 1.3 if kernel == "cos" else torch.e / 2
        torch.testing.assert_close(matrix.diagonal(), torch.full((grid**2,), peak))
        assert torch.equal(matrix, matrix.T)
        first_row = matrix[0].reshape(grid, grid)
        assert (first_row.diff(dim=0) < 0).logical_or(first_row[1:] == 0).all()
        assert first_row.min() >= 0  # the last factor of "cos" is cos(pi/2), 6e-17 on one processor, -2e-16 on another

    def test_a_cosine_that_rounds_to_below_0_makes_no_factor_that_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On every processor, as on one whose cosine of pi/2 is -2e-16."""
        cosine = torch.cos
        monkeypatch.setattr(torch, "cos", lambda x: cosine(x) - 3e-16)
        for grid in (2, 3):
            assert amm_matrix(grid, "cos").min() == 0

    @pytest.mark.parametrize("grid", [1, 2, 5, 16])
    def test_a_radius_of_ones_own_cuts_by_distance(self, grid: int) -> None:
        paper = amm_matrix(grid)
        assert torch.equal(amm_matrix(grid, radius=(4 + (grid - 1) ** 2) ** 0.5), paper)
        full, near = amm_matrix(grid, radius=100.0), amm_matrix(grid, radius=2**0.5)
        assert (full > 0).all()
        assert torch.equal(torch.where(near > 0, full, 0.0), near)
        places = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).double()
        within = torch.cdist(places, places) < 1.5  # neighbours, those across the corner included
        assert torch.equal(near > 0, within)

    def test_radius_and_kernel_are_set_with_the_blocks_and_recorded(self) -> None:
        model = tiny((0, 2))
        paper = model(*batch(model))
        model.set_amm((0, 2), radius=1.0, kernel="cos")
        assert (model.config.amm_radius, model.config.amm_kernel) == (1.0, "cos")
        changed = model(*batch(model))
        assert not torch.allclose(changed, paper)
        rebuilt = EDT(ModelConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))))
        rebuilt.load_state_dict(model.state_dict())
        assert torch.equal(rebuilt.eval()(*batch(model)), changed)
        model.set_amm((0, 2))  # back to the paper's radius and the kernel that the model was built with
        assert model.config == tiny((0, 2)).config
        assert torch.equal(model(*batch(model)), paper)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"radius": 0.0}, r"amm_radius is 0\.0"), ({"radius": float("inf")}, "inf"), ({"kernel": "gauss"}, "'gauss'")],
    )
    def test_refused_options_leave_amm_as_it_was(self, options: dict[str, object], message: str) -> None:
        model = tiny((2,))
        before = model(*batch(model))
        with pytest.raises(UserError, match=message):
            model.set_amm((0, 2), **options)  # type: ignore[arg-type]
        assert torch.equal(model(*batch(model)), before)

    def test_kernel_follows_the_resolution(self) -> None:
        assert model_config("EDT-S/2", 256).amm_kernel == "exp_cos"
        assert model_config("EDT-S/2", 512).amm_kernel == "cos"

    @pytest.mark.parametrize(
        ("name", "cfg_scale", "image_size", "blocks"),
        [
            ("EDT-S/2", 1.0, 256, (7, 10)),
            ("EDT-B/2", 1.5, 256, (7, 10)),
            ("EDT-S/2", 1.99, 256, (7, 10)),
            ("EDT-S/2", 2.0, 256, (8,)),
            ("EDT-B/2", 4.0, 256, (8,)),
            ("EDT-S/2", 1.5, 512, (10,)),
            ("EDT-XL/2", 1.0, 256, (23, 25)),
            ("EDT-XL/2", 4.0, 256, (23, 25)),
            ("EDT-S/2", 1.0, 128, (7, 10)),
            ("EDT-B/2", 4.0, 512, (10,)),
            ("DiT-S/2", 1.0, 256, (8, 10)),
            ("DiT-S/2", 1.5, 256, (8, 10)),
            ("DiT-XL/2", 1.0, 256, (15, 17, 19, 22, 24)),
            ("MDTv2-S/2", 1.0, 256, (8,)),
            ("MDTv2-S/2", 3.8, 256, (8,)),
        ],
    )
    def test_placement_of_the_paper(
        self, name: str, cfg_scale: float, image_size: int, blocks: tuple[int, ...]
    ) -> None:
        assert paper_amm_blocks(name, cfg_scale, image_size) == blocks
        assert has_paper_amm_blocks(name, image_size)
        model_config(name, image_size, amm_blocks=blocks)

    def test_every_published_placement_fits_its_model(self) -> None:
        for placement in AMM_PLACEMENTS:
            config = model_config(placement.model, 512 if placement.large else 256, amm_blocks=placement.blocks)
            assert paper_amm_blocks(config.name, placement.cfg_scales[0], config.image_size) == placement.blocks
            assert placement.cfg_scales[0] <= placement.cfg_scales[1]

    @pytest.mark.parametrize(
        ("name", "cfg_scale", "image_size", "published"),
        [
            ("EDT-Tiny/2", 2.0, 32, "other models only: EDT-S/2, EDT-B/2, EDT-XL/2, DiT-S/2, DiT-XL/2, MDTv2-S/2"),
            ("DiT-B/2", 1.0, 256, "other models only"),
            ("DiT-S/4", 1.0, 256, "other models only"),
            ("MDTv2-XL/2", 1.0, 256, "other models only"),
            ("DiT-XL/2", 1.5, 256, r"DiT-XL/2: blocks \[15, 17, 19, 22, 24\] for cfg_scale 1 and less than 512 px"),
            ("DiT-S/2", 2.0, 256, r"DiT-S/2: blocks \[8, 10\] for cfg_scale 1 to 1\.5"),
            ("MDTv2-S/2", 4.0, 256, r"MDTv2-S/2: blocks \[8\] for cfg_scale 1 to 3\.8"),
            ("DiT-XL/2", 1.0, 512, "DiT-XL/2: blocks"),
            ("EDT-XL/2", 1.0, 512, "EDT-XL/2: blocks"),
        ],
    )
    def test_a_placement_that_is_not_published_is_refused(
        self, name: str, cfg_scale: float, image_size: int, published: str
    ) -> None:
        message = rf"for {name} at {image_size} px with cfg_scale {cfg_scale:g}\. Published for {published}.*amm-search"
        with pytest.raises(UserError, match=message):
            paper_amm_blocks(name, cfg_scale, image_size)

    def test_which_models_have_a_published_placement(self) -> None:
        models = {name for name in MODEL_NAMES if has_paper_amm_blocks(name)}
        assert models == {"EDT-S/2", "EDT-B/2", "EDT-XL/2", "DiT-S/2", "DiT-XL/2", "MDTv2-S/2"}
        assert {name for name in MODEL_NAMES if has_paper_amm_blocks(name, 512)} == {"EDT-S/2", "EDT-B/2"}


class TestMasking:
    def test_sites(self) -> None:
        sites = mask_sites(model_config("EDT-XL/2"))
        assert [(site.module, site.tokens, site.ratio_range) for site in sites] == [
            ("blocks.4", 256, (0.15, 0.25)),
            ("down_blocks.0", 256, (0.4, 0.5)),
            ("down_blocks.1", 64, (0.1, 0.2)),
        ]
        assert [site.tokens for site in mask_sites(model_config("EDT-Tiny/2", 32))] == [16, 4]

    def test_keeping_everything_equals_no_masks(self) -> None:
        model = mid_masked(tiny())
        keep_all = [torch.ones(3, site.tokens, dtype=torch.bool) for site in mask_sites(model.config)]
        assert torch.equal(model(*batch(model), masks=keep_all), model(*batch(model)))

    @pytest.mark.parametrize("site", [0, 1, 2])
    def test_a_mask_changes_its_own_sample_only(self, site: int) -> None:
        model = mid_masked(tiny())
        masks = [torch.ones(3, site.tokens, dtype=torch.bool) for site in mask_sites(model.config)]
        masks[site][1, 0] = False
        changed = (model(*batch(model), masks=masks) != model(*batch(model))).flatten(1).any(dim=1)
        assert changed.tolist() == [False, True, False]

    def test_masked_tokens_in_the_first_stage_are_forgotten(self) -> None:
        """With all tokens masked before the first block, latents pass by the long skips alone."""
        model = mid_masked(tiny(), block=0)
        for skip in model.concat_blocks:
            skip.norm_final.register_forward_pre_hook(forget_skip)
        masks = [torch.ones(3, site.tokens, dtype=torch.bool) for site in mask_sites(model.config)]
        masks[0][:] = False
        x, t, y = batch(model)
        assert torch.equal(model(x, t, y, masks), model(-x, t, y, masks))

    def test_draws_are_those_of_the_generator(self) -> None:
        config = model_config("EDT-XL/2")
        masks, again = draw_masks(config, 6, seeded(3)), draw_masks(config, 6, seeded(3))
        assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))
        ranks = [slice_masks(masks, slice(start, start + 2)) for start in (0, 2, 4)]
        for site, mask in enumerate(masks):
            assert torch.equal(torch.cat([rank[site] for rank in ranks]), mask)

    def test_share_of_masked_tokens_is_the_ratio_drawn(self) -> None:
        config = model_config("EDT-XL/2")
        ratios = draw_mask_ratios(config, seeded(5))
        masks = draw_masks(config, 512, seeded(5))
        for site, ratio, mask in zip(mask_sites(config), ratios, masks, strict=True):
            assert site.ratio_range[0] <= ratio <= site.ratio_range[1]
            assert abs((~mask).float().mean() - ratio) < 0.01

    def test_wrong_masks(self) -> None:
        model = tiny()
        masks = draw_masks(model.config, 3, seeded())
        more = draw_masks(model.config, 4, seeded())
        for wrong in (masks[:1], more, [masks[0], masks[1][:2]], [mask.float() for mask in masks]):
            with pytest.raises(ValueError, match=r"2 boolean masks of \[16, 4\] tokens for up to 3 rows"):
                model(*batch(model), masks=wrong)


def mid_masked(model: EDT, block: int = 1) -> EDT:
    """The same weights with a masking site in the first stage, as the extra large model has."""
    twin = EDT(replace(model.config, mid_mask_block=block))
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def forget_skip(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Zero the half of the concatenation that comes from the long skip."""
    joined, *rest = inputs
    own, skip = joined.chunk(2, dim=-1)
    return torch.cat([own, torch.zeros_like(skip)], dim=-1), *rest


def test_macs_agree_with_a_counter_of_what_runs() -> None:
    """AMM in every block writes attention of few tokens on a CPU out, as the two products that are counted."""
    model = create_model("EDT-Tiny/2", 64, CLASSES)
    model.set_amm(range(model.config.num_blocks))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*batch(model, size=1))
    assert counter.get_total_flops() == 2 * count_macs(model)

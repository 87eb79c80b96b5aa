"""`train.model_overrides` in a pipeline's configuration, in its plan, and in the record of a version."""

import json
from pathlib import Path

import pytest

from edt_core.errors import UserError
from edt_core.models import EDTConfig
from pipelines.config.schema import load_config
from tests.support.registry import NAME, Registry

FIELD = "train.model_overrides.token_enhancement=false"


def test_one_field_is_set_for_all_models_or_for_one() -> None:
    models = "models={a: {}, b: {model_overrides: {down_mask_ratios: [[0.1, 0.2], [0.0, 0.0]]}}}"
    config = load_config("quickstart", [FIELD, models])
    first, second = (config.model_of(name, 2) for name in ("a", "b"))
    assert isinstance(first, EDTConfig)
    assert isinstance(second, EDTConfig)
    assert not first.token_enhancement
    assert second.token_enhancement  # the model's own fields replace those of the shared section
    assert second.down_mask_ratios == ((0.1, 0.2), (0.0, 0.0))


def test_the_untrained_model_that_it_is_compared_with_has_them_too() -> None:
    from pipelines.diff import outline

    before, after = outline(load_config("quickstart")), outline(load_config("quickstart", [FIELD]))
    changed = {step for step in before if before[step] != after[step]}
    assert "untrained train edt-tiny-digits-32" in changed
    assert "encode" not in changed


@pytest.mark.parametrize(
    ("assignments", "problem"),
    [
        ([FIELD, "train.model=DiT-Tiny/2", "train.masked_loss=false"], "a model of DiT takes depth"),
        (
            ["train.model_overrides.dims=[1]"],
            "dims for EDT-Tiny/2, but a model of EDT takes depths, token_enh",
        ),
        (["train.model_overrides.depths=[1]"], "the same odd number of entries"),
        (["train.model_overrides.mid_mask_block=7"], r"mid_mask_block is 7, .* 0\.\.1"),
        (["train.model_overrides.down_mask_ratios=[]"], "no masked pass, but masked_loss is true"),
        (["train.model_overrides=3"], "model_overrides"),
        (["models={m: {model_overrides: {position_supplement: 7}}}"], "position_supplement of EDT-Tiny/2 is 7: input"),
    ],
)
def test_what_a_configuration_may_not_say(assignments: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_config("quickstart", assignments)


def test_a_version_says_in_what_it_differs(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    overrides = {"token_enhancement": False, "down_mask_ratios": [[0.1, 0.2], [0.3, 0.4]]}
    registry.add("plain", 2.0)
    registry.add("bare", 1.0, costs={"model_overrides": overrides})
    plain, bare = (registry.catalog.client.get_model_version(NAME, number).tags for number in ("1", "2"))
    assert "edt.model_overrides" not in plain
    assert json.loads(bare["edt.model_overrides"]) == overrides

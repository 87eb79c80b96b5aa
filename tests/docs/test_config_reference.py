"""docs/config.md is what the schemas say, and says all that a person who sets a field wants to know."""

import re
from pathlib import Path
from typing import get_args

from pydantic.fields import FieldInfo

from edt_core.config import Section
from pipelines.config.reference import reference, unit_of
from pipelines.config.schema import PipelineConfig

PAGE = Path(__file__).parents[2] / "docs" / "config.md"
# Numbers without a unit: shares, rates, weights, scales, counts of what the name says.
PURE = {
    "num_canonical_nodes",
    "prune",  # a ratio
    "keep",
    "uncut_amm_blocks",
    *(
        "seed",
        "seeds",
        "order",
        "lr",
        "lr_final",
        "kl_weight",
        "weight_decay",
        "ema_decay",
        "min_snr_gamma",
        "max_grad_norm",
        "margin",
        "teacher_margin",
    ),
    *("holdout_fraction", "max_bad_fraction", "class_dropout_prob", "mirror_prob", "cfg_scale", "cfg_power"),
    *("downsample_factor", "layers_per_block", "jpeg_quality", "max_rollbacks", "max_failures", "repeats"),
    *("align_weight", "align_features", "width", "mup_base_width", "widths"),
    *("amm_blocks", "require", "confidence", "max_drift", "decay_fraction", "holdout", "time_shift", "temperature"),
}


def fields(
    section: type[Section] = PipelineConfig, inner_sections: dict[str, type[Section]] | None = None
) -> dict[str, FieldInfo]:
    """Every field of the schemas, by dotted name; sections within the fields of a section come last."""
    inner_sections = {} if inner_sections is None else inner_sections
    found: dict[str, FieldInfo] = {}
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= {f"{name}.{inner}": field for inner, field in fields(kind, inner_sections).items()}
        else:
            found[name] = info
            for within in get_args(kind):  # as `sample.cache`, which several sections have
                if isinstance(within, type) and issubclass(within, Section):
                    inner_sections[name] = within
    if section is PipelineConfig:
        for name, within in inner_sections.items():
            found |= {f"{name}.{inner}": field for inner, field in within.model_fields.items()}
    return found


def test_the_page_is_current() -> None:
    remedy = "python -m pipelines.config.reference > docs/config.md"
    assert PAGE.read_text() == reference(), f"the schemas have changed since docs/config.md was written: {remedy}"


def test_the_page_has_every_field_once() -> None:
    rows = [line.split("`")[1] for line in reference().splitlines() if line.startswith("| `")]
    assert rows == [name.rpartition(".")[2] for name in sorted(fields(), key=_place)]


def _place(name: str) -> tuple[int, str, int]:
    """Fields of the pipeline itself come first, then the sections in the schema's order."""
    section, _, field = name.rpartition(".")
    order = list(PipelineConfig.model_fields)
    place = order.index(section) + 1 if section in order else len(order) + 1
    return (place if section else 0, section, list(fields()).index(name) if field else 0)


def test_a_number_has_a_unit_or_is_known_to_have_none() -> None:
    kinds = {name: re.findall(r"\w+", str(info.annotation)) for name, info in fields().items()}
    names = {name.rpartition(".")[2] for name, words in kinds.items() if "int" in words or "float" in words}
    assert names >= PURE
    wrong = [name for name in names if (unit_of(name) is None) != (name in PURE)]
    assert not wrong, f"give their units in pipelines/config/reference.py: {wrong}"


def test_every_field_says_what_it_is() -> None:
    assert [name for name, info in fields().items() if not info.description] == []

"""Results are compared only with results of the same protocol."""

from typing import Any

import pytest

from edt_core.evaluation.protocol import comparison_table, protocol_differences, same_protocol

PROTOCOL: dict[str, Any] = {
    "cfg_scale": 1.5,
    "sampler": {"name": "ddim", "steps": 50},
    "interval": (0, 400),
    "seed": None,
}


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        ({}, []),
        ({"cfg_scale": 2.0}, ["cfg_scale 1.5 / 2.0"]),
        ({"sampler": {"name": "ancestral", "steps": 250}}, ["sampler.name ddim / ancestral", "sampler.steps 50 / 250"]),
        ({"sampler": {"name": "ddim", "steps": 50.0}}, []),  # as JSON may write it
        ({"interval": [0, 400]}, []),
        ({"interval": [0, 300]}, ["interval [0, 400] / [0, 300]"]),
        (
            {"sampler": "ddim"},
            ["sampler.name ddim / (not stated)", "sampler.steps 50 / (not stated)", "sampler (not stated) / ddim"],
        ),
        ({"repeats": 3}, ["repeats (not stated) / 3"]),
        ({"seed": 0}, ["seed null / 0"]),
        ({"guide": {}}, ["guide (not stated) / {}"]),
    ],
)
def test_differences_name_the_field_and_both_values(change: dict[str, Any], differences: list[str]) -> None:
    other = {**PROTOCOL, **change}
    assert protocol_differences(PROTOCOL, other) == differences
    assert same_protocol(PROTOCOL, other) is not bool(differences)
    assert same_protocol(other, PROTOCOL) is not bool(differences)


def test_true_is_not_one() -> None:
    assert protocol_differences({"a": True}, {"a": 1}) == ["a true / 1"]
    assert not same_protocol({"a": [True]}, {"a": [1]})


def result(protocol: dict[str, Any] | None = None, **metrics: float) -> dict[str, Any]:
    return {"metrics": metrics, "protocol": PROTOCOL if protocol is None else protocol}


def test_a_table_of_one_protocol_says_so() -> None:
    table = comparison_table({"small": result(fid=4.21, fid_std=0.03, kid=0.0012345), "big|new": result(fid=3.0)})
    assert table.splitlines() == [
        "| metric | small | big\\|new |",
        "|---|---|---|",
        "| fid | 4.21 ± 0.03 | 3 |",
        "| kid | 0.001234 | - |",
        "",
        "All measured by one protocol.",
    ]


def test_a_table_of_several_protocols_says_in_what_they_differ() -> None:
    guided, short = {**PROTOCOL, "cfg_scale": 2.0}, {**PROTOCOL, "sampler": {"name": "ddim", "steps": 25}}
    table = comparison_table({"a": result(fid=1.0), "b": result(guided, fid=2.0), "c": result(short, fid=3.0)})
    assert table.splitlines()[-3:] == [
        "**Not comparable**: measured by different protocols (a / b / c):",
        "- cfg_scale: 1.5 / 2.0 / 1.5",
        "- sampler.steps: 50 / 50 / 25",
    ]
    assert "one protocol" not in table


def test_a_result_without_a_protocol_is_not_comparable() -> None:
    assert "No protocol is stated for b" in comparison_table({"a": result(fid=1.0), "b": result({}, fid=2.0)})
    assert "one protocol" not in comparison_table({"a": result({}, fid=1.0), "b": result({}, fid=2.0)})


@pytest.mark.parametrize(
    ("value", "spread", "cell"),
    [
        (4.2134, 0.0278, "4.213 ± 0.028"),
        (250.31, 4.67, "250.3 ± 4.7"),
        (4.0, 0.03, "4.00 ± 0.03"),
        (0.0000123456, None, "0.00001235"),
        (123456.0, None, "123456"),
        (0.0, 0.0, "0 ± 0"),
        (float("nan"), None, "nan"),
        (-0.00012, 0.00003, "-0.00012 ± 0.00003"),
    ],
)
def test_values_are_shown_in_four_digits(value: float, spread: float | None, cell: str) -> None:
    metrics = {"fid": value} if spread is None else {"fid": value, "fid_std": spread}
    assert f"| fid | {cell} |" in comparison_table({"a": result(**metrics)})


def test_a_spread_without_its_metric_is_a_row() -> None:
    assert "| fid_std | 0.5 |" in comparison_table({"a": result(fid_std=0.5)})

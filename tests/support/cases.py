"""The cases of a parametrised test: those that prove something of their own, and repetitions."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def suite_of(kept: Sequence[Any], cases: Iterable[Any]) -> list[Any]:
    """`cases` for `pytest.mark.parametrize`: in the suite those that are `kept`, the others behind the mark `slow`.

    A case of several arguments is a tuple.
    """
    every = list(cases)
    assert all(case in every for case in kept), "a case to keep is not among the cases"
    return [case if case in kept else pytest.param(*_arguments(case), marks=pytest.mark.slow) for case in every]


def _arguments(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)

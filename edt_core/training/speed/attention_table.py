"""A table of the fastest form of attention for each number of tokens, as measured on one kind of device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from edt_core.errors import UserError
from edt_core.models.attention import AttentionForm

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

_FUSED, _WRITTEN_OUT = "fused", ("written out", "written out, compiled")  # as the acceptance names them


def attention_forms(config: TrainConfig) -> dict[int, AttentionForm]:
    """The forms of a training by number of tokens; none without `train.attention_table`.

    Raises UserError for a file that is missing or has anything else.
    """
    return {} if config.attention_table is None else read_attention_table(Path(config.attention_table))


def read_attention_table(path: Path) -> dict[int, AttentionForm]:
    """The forms by number of tokens, from {tokens: form} or from what `edt_core.acceptance --attention-table` wrote.

    Raises UserError for a file that is missing or has anything else.
    """
    forms = get_args(AttentionForm)
    remedy = (
        f"it must be a JSON object of numbers of tokens and forms ({', '.join(forms)}), such as "
        '{"64": "written_out"}, or the file of `python -m edt_core.acceptance --attention-table`; mend it, or leave '
        "out train.attention_table"
    )
    try:
        table: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the attention table {path} (train.attention_table) cannot be read: {error}; {remedy}"
        ) from None
    if not isinstance(table, dict):
        raise UserError(f"the attention table {path} (train.attention_table) is a {type(table).__name__}; {remedy}")
    if "training" in table:
        table = _measured(table["training"], path)
    for tokens, form in table.items():
        if not (tokens.isascii() and tokens.isdigit()) or form not in forms:
            raise UserError(f"the attention table {path} (train.attention_table) has {tokens!r}: {form!r}; {remedy}")
    return {int(tokens): form for tokens, form in table.items()}


def _measured(rows: Any, path: Path) -> dict[str, AttentionForm]:
    """The faster form for each number of tokens, forward and backward, of the forms that a model has."""
    try:
        return {str(row["tokens"]): _faster(row["ms"]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the attention table {path} (train.attention_table) is not what the acceptance writes: {error!r}; "
            "measure it again with `python -m edt_core.acceptance --attention-table FILE`"
        ) from None


def _faster(ms: dict[str, float]) -> AttentionForm:
    written_out = min((ms[name] for name in _WRITTEN_OUT if name in ms), default=None)
    fused = ms.get(_FUSED)
    if fused is None and written_out is None:
        raise ValueError(f"neither {_FUSED} nor {_WRITTEN_OUT[0]} was measured")
    return "sdpa" if written_out is None or (fused is not None and fused <= written_out) else "written_out"

"""A table of the fastest form of attention for each number of tokens, as measured on one kind of device."""

import json
from pathlib import Path
from typing import Any, get_args

from edt_core.errors import UserError
from edt_core.models.attention import AttentionForm


def read_attention_table(path: Path) -> dict[int, AttentionForm]:
    """The forms by number of tokens. Raises UserError for a file that is missing or has anything else."""
    forms = get_args(AttentionForm)
    remedy = (
        f"it must be a JSON object of numbers of tokens and forms ({', '.join(forms)}), such as "
        '{"64": "written_out"}; mend it, or leave out train.attention_table'
    )
    try:
        table: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the attention table {path} (train.attention_table) cannot be read: {error}; {remedy}"
        ) from None
    if not isinstance(table, dict):
        raise UserError(f"the attention table {path} (train.attention_table) is a {type(table).__name__}; {remedy}")
    for tokens, form in table.items():
        if not (tokens.isascii() and tokens.isdigit()) or form not in forms:
            raise UserError(f"the attention table {path} (train.attention_table) has {tokens!r}: {form!r}; {remedy}")
    return {int(tokens): form for tokens, form in table.items()}

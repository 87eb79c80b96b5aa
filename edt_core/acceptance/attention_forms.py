"""Section C, attention: the time of each form by the number of tokens, and a table of the fastest.

Legend: N rows, H heads, T tokens, d = 56 channels of a head (52 padded).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edt_core.acceptance.machine import machine
from edt_core.acceptance.rows import Measure, Task, figure
from edt_core.acceptance.subjects import Setting, in_turns
from edt_core.models.attention import RelativePositionBias, written_out_attention
from edt_core.precision import use_precision

_SIDES = (4, 8, 16, 32)
_HEADS = {4: 10, 8: 8, 16: 6, 32: 6}  # of EDT-S, by the side of the grid
_TOKENS = 64 * 1024  # N * T, about that of 256 images at 16 x 16
_CHANNELS, _SCALE = 56, 52**-0.5
_TURNS = 10

Form = Callable[["Case"], Tensor]


@dataclass
class Case:
    """Queries, keys and values [N, H, T, d] in bf16 on the device, and a bias table."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: RelativePositionBias

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.bias.relative_position_bias_table]


@dataclass
class Table:
    """Milliseconds of each form by tokens, for training and for inference."""

    training: dict[int, dict[str, float]] = field(default_factory=dict)
    inference: dict[int, dict[str, float]] = field(default_factory=dict)

    def write(self, path: Path, device: torch.device) -> None:
        """Write the table with the fastest form of each row; the file is replaced at once."""
        parts = {
            name: [
                {"tokens": tokens, "fastest": min(forms, key=lambda form: forms[form]), "ms": forms}
                for tokens, forms in sorted(rows.items())
            ]
            for name, rows in (("training", self.training), ("inference", self.inference))
        }
        head = {**machine(device), "precision": "bf16", "channels": _CHANNELS}
        beside = path.with_name(f".{path.name}.part")
        beside.write_text(json.dumps({**head, **parts}, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)


def tasks(setting: Setting) -> Iterator[Task]:
    """Each number of tokens; then, because it takes long to compile, flex_attention for each."""
    table = Table()
    for make, what, seconds in ((forms_of, "attention", 12), (flex_forms, "flex attention", 20)):
        for side in _SIDES if setting.is_full else _SIDES[:2]:
            name, run = f"{what} with {side * side} tokens", partial(attention_rows, side, make, table, setting)
            if setting.on_gpu or make is forms_of:  # on a CPU, flex_attention has no backward pass
                yield Task(name, run, setting.seconds(seconds), setting.gib(12))


def attention_rows(
    side: int, make: Callable[[int, Setting], dict[str, Form]], table: Table, setting: Setting
) -> Iterator[Measure]:
    """Some forms for a grid, forward alone and with the backward pass."""
    use_precision("bf16")
    case = random_case(side, setting)
    forms, reasons = working_forms(make(side, setting), case)
    for form, reason in reasons.items():
        yield Measure(f"attention, {side * side} tokens: {form}", None, note=f"left out: {reason}")
    turns = setting.count(_TURNS)
    for name, rows, call in (("training", table.training, _both), ("inference", table.inference, _forward)):
        steps = {form: partial(call, function, case) for form, function in forms.items()}
        seconds = in_turns(steps, turns, 0 if turns == 1 else 2, setting.device)
        known = rows.setdefault(side * side, {})
        known.update({form: 1000 * duration for form, duration in seconds.items()})
        for form in seconds:
            fastest = "fastest so far" if known[form] == min(known.values()) else ""
            yield figure(f"attention, {side * side} tokens, {name}: {form}", known[form], "ms", fastest)
    if setting.attention_table is not None:
        table.write(setting.attention_table, setting.device)


def random_case(side: int, setting: Setting) -> Case:
    """Random inputs; fewer rows for more tokens."""
    heads, tokens = _HEADS[side], side * side
    rows = max(2, setting.count(_TOKENS) // tokens) if setting.is_full else 2
    shape = (rows, heads, tokens, _CHANNELS)
    q, k, v = (torch.randn(shape, device=setting.device, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    bias = RelativePositionBias(side, heads).to(setting.device)
    torch.nn.init.normal_(bias.relative_position_bias_table, std=0.5)
    return Case(q, k, v, bias)


def forms_of(side: int, setting: Setting) -> dict[str, Form]:
    """The forms that need no long compilation, by name."""
    forms: dict[str, Form] = {
        "fused": fused,
        "written out": written_out,
    }
    if setting.is_full:
        forms["written out, compiled"] = setting.compiled(written_out)
    return forms


def fused(case: Case) -> Tensor:
    """`scaled_dot_product_attention` with the bias as its mask, as models call it."""
    bias = case.bias().to(case.q.dtype).unsqueeze(0)
    return F.scaled_dot_product_attention(case.q, case.k, case.v, attn_mask=bias, scale=_SCALE)


def written_out(case: Case) -> Tensor:
    """Products, softmax and bias one by one, with all scores in memory."""
    return written_out_attention(case.q, case.k, case.v, case.bias().to(case.q.dtype), _SCALE)


def flex_forms(side: int, setting: Setting) -> dict[str, Form]:
    """PyTorch's flex_attention, which looks the bias up in its table: no bias [H, T, T] and no gradient of it."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = flex_attention
    span = 2 * side - 1

    def form(case: Case) -> Tensor:
        table = case.bias.relative_position_bias_table

        def with_bias(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            down = query // side - key // side + side - 1
            across = query % side - key % side + side - 1
            return score + table[down * span + across, head].to(score.dtype)

        out: Tensor = attend(case.q, case.k, case.v, score_mod=with_bias, scale=_SCALE)
        return out

    return {"flex, compiled": setting.compiled(form)}


def working_forms(forms: dict[str, Form], case: Case) -> tuple[dict[str, Form], dict[str, str]]:
    """The forms that this PyTorch and device can compute, forward and backward, and why the others cannot."""
    found, reasons = {}, {}
    for name, form in forms.items():
        try:
            _both(form, case)
            found[name] = form
        except Exception as error:  # a limit of one form is no failure
            reasons[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    return found, reasons


def _both(form: Form, case: Case) -> None:
    for leaf in case.leaves:
        leaf.grad = None
    form(case).float().square().mean().backward()


@torch.no_grad()
def _forward(form: Form, case: Case) -> None:
    form(case)

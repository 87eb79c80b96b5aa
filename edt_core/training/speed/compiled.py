"""The parts of a model compiled one by one with `torch.compile`, and what happens if that fails.

All blocks of one class share a compiled function, with one graph for each shape of their inputs: the time to compile
does not grow with the depth of a model, as it would for the model as a whole.

Legend: N = batch, T = tokens, k = unmasked tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer
from edt_core.models.layers import FinalLayer
from edt_core.models.quantized.linear import QuantizedLinear
from edt_core.training.ranks import Ranks

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

_MOST_GRAPHS = 64  # of one function; torch's 8 are too few for the shapes of five stages in two sizes of micro-batches
# What torch.compile(mode="reduce-overhead") sets, but not for shapes that vary.
_GRAPHS: dict[str, Any] = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}
Backend = str | Callable[..., Any]


def is_compiled(config: TrainConfig, device: torch.device) -> bool:
    """Whether to compile: what `train.compile` says, and by default on a CUDA device."""
    return device.type == "cuda" if config.compile is None else bool(config.compile)


def wants_graphs(config: TrainConfig) -> bool:
    """Whether `train.compile` asks for CUDA graphs."""
    return config.compile == "reduce-overhead"


def allow_graphs() -> None:
    """Let a compiled function have a graph for each shape. Settings of the process.

    Parts are small enough that DDP need not split their graphs to exchange gradients early.
    """
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, _MOST_GRAPHS)
    settings.optimize_ddp = False


def compile_parts(model: DiffusionTransformer, backend: Backend = "inductor", *, graphs: bool = False) -> None:
    """Compile the parts of a model in place, when they are first called. Its state dict stays the same.

    With `graphs` inductor replays each as a CUDA graph, one for each place in a step; call `begin_step` before each
    step. Parts whose number of tokens varies, as in MDTv2's masked pass, are launched as usual: each number would be
    another graph.
    """
    allow_graphs()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.build()
    options = _GRAPHS if graphs and backend == "inductor" else None
    functions: dict[type[nn.Module], Callable[..., Tensor]] = {}
    for part in model_parts(model):
        kind = type(part)
        if kind not in functions:
            functions[kind] = torch.compile(kind.forward, backend=backend, dynamic=False, options=options)
        part.forward = partial(_call, functions[kind], part)


def begin_step() -> None:
    """Let CUDA graphs reuse the memory of the step before, whose activations and gradients are not read again.

    Between its micro-batches nothing may be reused: gradients are added in that memory.
    """
    torch.compiler.cudagraph_mark_step_begin()


def undo_compiled_parts(model: DiffusionTransformer) -> None:
    """Undo `compile_parts`."""
    for part in model_parts(model):
        part.__dict__.pop("forward", None)


def model_parts(model: DiffusionTransformer) -> Iterator[nn.Module]:
    """The parts of a model that follow one another: its blocks, what joins its stages, and its final layer."""
    children = list(model.children())
    listed = [part for child in children if isinstance(child, nn.ModuleList) for part in child]
    yield from listed
    kinds = tuple({type(part) for part in listed} | {FinalLayer})
    yield from (child for child in children if isinstance(child, kinds))


def _call(function: Callable[..., Tensor], part: nn.Module, x: Tensor, *inputs: Tensor | None) -> Tensor:
    """A part's output for tokens x [N, T, D]. The graph depends on strides too, so x becomes contiguous.

    The number k of unmasked tokens differs from step to step for MDTv2: it is marked as dynamic.
    """
    x = x.contiguous()
    if any(other is not None and other.dtype == torch.int64 for other in inputs):
        for tokens in (x, *inputs):
            if tokens is not None and tokens.shape[:2] == x.shape[:2]:
                torch._dynamo.mark_dynamic(tokens, 1)
    return function(part, x, *inputs)


def failure(run: Callable[[], object], ranks: Ranks, *, stop: bool = False) -> str | None:
    """Call `run` on every rank; None if it worked on all of them, else the error, as text. Collective.

    Any error counts except a lack of memory: one that is not the compiler's occurs again without it. To `stop` is the
    way out if ranks wait for each other within `run`: then it raises a UserError on the rank that failed.
    """
    problem = ""
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler's are of many kinds, and those of its tools have no common one
        problem = error_text(error)
        if stop:
            raise UserError(
                f"the model could not be compiled ({problem}), and with train.shard=full the other workers wait for "
                "this one; set train.compile=false, or mend the compiler (a GPU needs triton and a C compiler)"
            ) from error
    failed = torch.tensor([[float(bool(problem))]], device=ranks.device)
    if not bool(ranks.gather(failed, [1] * ranks.world_size).any()):
        return None
    return problem or "on another worker"


def error_text(error: Exception) -> str:
    """The kind of an error and the first line of its message; of what dynamo wraps, the error inside."""
    inner = getattr(error, "inner_exception", None) or error
    lines = str(inner).strip().splitlines() or ["without a message"]
    return f"{type(inner).__name__}: {lines[0][:300]}"

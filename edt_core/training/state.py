"""The state that changes while training, and its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edt_core.diffusion import TimestepSampler, with_objective
from edt_core.errors import UserError
from edt_core.models import DiffusionTransformer, ModelConfig, build_model
from edt_core.store.layout import (
    EMA_WEIGHTS,
    MODEL_WEIGHTS,
    OPTIMIZER_STATE,
    OTHER_EMA_WEIGHTS,
    TIMESTEP_STATE,
    WIDTH_EMA_WEIGHTS,
)
from edt_core.training.align.head import AlignedModel, projection_head
from edt_core.training.align.settings import align_settings
from edt_core.training.checkpoint import Checkpoint, require_same
from edt_core.training.distill.teacher import training_times
from edt_core.training.ema import EMA
from edt_core.training.history import History
from edt_core.training.optim import Places, Scale, flatten_state, keep_owned, make_optimizer, restore_state
from edt_core.training.optimizers.muon import hidden_matrices
from edt_core.training.optimizers.mup import check_mup, fitted, mup_scales
from edt_core.training.prune.gates import RATE, GatedModel
from edt_core.training.ranks import Ranks
from edt_core.training.shard.owners import Shards
from edt_core.training.shard.rows import RowShards, load_own, own_state
from edt_core.training.start.trainable import merged, prepare_trainable

if TYPE_CHECKING:
    from edt_core.config import TrainConfig

_HEAD = "head."  # before the names of the parameters of `train.align`'s head, or `train.prune`'s gates


@dataclass
class TrainState:
    """Everything that changes while training; `step` is the number of completed steps.

    `skipped` are steps that are left out because their loss or gradient was not finite, `rollbacks` is the number of
    rollbacks for such steps. `seconds` is the training time so far, counted only if max_hours is set. `aligned` is the
    model with the head of `train.align`, or with the gates of `train.prune`; their parameters have no average. With
    `shards` this rank has the optimizer's state and the averages of its own tensors, and `places` are those of the
    optimizer's parameters; with `RowShards` it has its own rows of everything.
    """

    model: DiffusionTransformer
    ema: EMA
    optimizer: torch.optim.Optimizer
    timesteps: TimestepSampler
    history: History = field(default_factory=History)
    step: int = 0
    skipped: set[int] = field(default_factory=set)
    rollbacks: int = 0
    seconds: float = 0.0
    trained: frozenset[str] | None = None
    base: str | None = None
    aligned: AlignedModel | GatedModel | None = None
    shards: Shards | RowShards | None = None
    places: Places | None = None

    @property
    def rows(self) -> RowShards | None:
        """The division by rows, if `train.shard` is full."""
        return self.shards if isinstance(self.shards, RowShards) else None

    @property
    def network(self) -> nn.Module:
        """What a step calls, and DDP wraps: the model, with the head of its alignment or its gates if it has any."""
        return self.model if self.aligned is None else self.aligned

    def heads(self) -> dict[str, nn.Parameter]:
        """The parameters of the head by name, empty without one."""
        return _heads(self.aligned)

    def zero_grad(self) -> None:
        """Remove the gradients of all parameters, also of those that other ranks update."""
        self.network.zero_grad(set_to_none=True)
        if self.rows is not None:
            self.rows.zero_grad()

    def exchange(self) -> None:
        """Give every rank the weights that others have updated. Collective if the state is divided."""
        if self.shards is not None:
            self.shards.exchange({name: value for name, value in self.own().items() if value.requires_grad})

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the model, then those of the head; this rank's rows of them, if it has no more."""
        yield from self.own().values()

    def own(self) -> dict[str, nn.Parameter]:
        """The same by name."""
        if self.rows is not None:
            return dict(self.rows.parameters)
        return {**dict(self.model.named_parameters()), **self.heads()}

    def norm(self, norm_of: Callable[[Iterable[nn.Parameter]], Tensor]) -> Tensor:
        """The norm of the whole gradient, [] on its device, of the function that computes one. Collective."""
        norm = norm_of(self.parameters())
        return norm if self.rows is None else self.rows.total_norm(norm)

    def average(self) -> Mapping[str, Tensor]:
        """The weights that are sampled from, of an ordinary model: those of the first average, and of the base.

        Collective if the state is divided.
        """
        average: Mapping[str, Tensor] = self.ema.averages[0]
        if self.shards is not None and not self.ema.whole:
            average = self.shards.whole(average, _trained_weights(self))
        return average if self.trained is None else merged({**self.model.state_dict(), **average})


def _heads(aligned: AlignedModel | GatedModel | None) -> dict[str, nn.Parameter]:
    head = {} if aligned is None else dict(aligned.head.named_parameters())
    return {f"{_HEAD}{name}": parameter for name, parameter in head.items()}


def initial_model(config: ModelConfig, seed: int) -> DiffusionTransformer:
    """A new model whose weights depend on the seed alone, not on the state of the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(config)


def initial_state(
    config: TrainConfig,
    model_config: ModelConfig,
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
) -> TrainState:
    """The state before the first step, of one of `ranks` if `train.shard` divides it.

    Raises UserError if the model and the training have different objectives.
    """
    if with_objective(model_config, config.objective) != model_config:
        raise UserError(
            f"train.objective is {config.objective!r}, but the model has objective {model_config.objective!r} and "
            f"{model_config.outputs} outputs; create its configuration with with_objective(config, "
            f"{config.objective!r})"
        )
    check_mup(config, model_config)
    model = fitted(initial_model(model_config, config.seed), config).to(device).train()
    trained = prepare_trainable(model, config.trainable)
    if not config.masked_loss:
        for parameter in model.masking_parameters():
            parameter.requires_grad_(False)  # DDP waits for the gradient of every parameter that requires one
    aligned = _with_head(config, model, device)
    network = model if aligned is None else aligned
    matrices = hidden_matrices(model)
    scales = mup_scales(config, model, matrices)
    if isinstance(aligned, GatedModel):
        scales[aligned.head.logits] = Scale(RATE)
    mode = "none" if ranks is None or ranks.world_size == 1 else config.shard
    shards: Shards | RowShards | None = None
    places = owned = None
    if ranks is not None and mode == "full":
        shards = RowShards.of(ranks, network, model, _heads(aligned), config.gradient_dtype)
    parameters = shards.parameters.values() if isinstance(shards, RowShards) else network.parameters()
    optimizer = make_optimizer(config, (p for p in parameters if p.requires_grad), matrices, scales)
    if ranks is not None and mode == "optimizer":
        weights = {name: value for name, value in model.state_dict().items() if trained is None or name in trained}
        shards = Shards.of(ranks, {**weights, **_heads(aligned)})
        owned = shards.own(shards.owners)
        places = keep_owned(optimizer, set(shards.own({**dict(model.named_parameters()), **_heads(aligned)}).values()))
    return TrainState(
        model=model,
        trained=trained,
        # The target of align self is the first average as a model, which each rank calls at each step.
        ema=EMA(model, config.ema_decays, trained, config.ema_widths, owned, whole=int(config.align == "self")),
        optimizer=optimizer,
        timesteps=training_times(config),
        aligned=aligned,
        shards=shards,
        places=places,
    )


def _with_head(
    config: TrainConfig, model: DiffusionTransformer, device: torch.device | str
) -> AlignedModel | GatedModel | None:
    """The model with what its training adds to it; None if that is nothing."""
    if config.prune is not None:
        return GatedModel(model, config.prune).to(device)
    settings = align_settings(config, model.config)
    if settings is None:
        return None
    head = projection_head(settings.head_widths, config.seed).to(device)
    return AlignedModel(model, head, settings.block)


def restart(state: TrainState, config: TrainConfig, initial: Checkpoint | None = None) -> None:
    """Reset a state to its values before the first step: those of `initial`, a checkpoint of step 0, if given."""
    fresh = initial or to_checkpoint(initial_state(config, state.model.config), config, 0)
    restore(state, fresh, config, 0)


def ema_files(config: TrainConfig) -> list[str]:
    """Files of the averages, in the order of the decays, then of the widths."""
    others = [OTHER_EMA_WEIGHTS.format(decay) for decay in config.ema_decays[1:]]
    return [EMA_WEIGHTS, *others, *(WIDTH_EMA_WEIGHTS.format(width) for width in config.ema_widths)]


def to_checkpoint(
    state: TrainState, config: TrainConfig, num_samples: int, *, regular: bool = True, whole: bool = False
) -> Checkpoint:
    """The checkpoint of a state, its tensors not copied; `num_samples` is the size of the data set.

    Of a state that is divided, it has the tensors of this rank: those of all ranks together are the checkpoint.

    A regular checkpoint takes the history's score, and the history starts a new one. If few parameters are trained, it
    holds those alone, unless `whole`.
    """
    from edt_core.config import result_fields

    score = state.history.take_score() if regular else None
    optimizer, groups = flatten_state(state.optimizer, state.places)
    averages = dict(zip(ema_files(config), state.ema.averages, strict=True))
    timesteps = {name: torch.from_numpy(value) for name, value in state.timesteps.state_dict().items()}
    tensors = {
        MODEL_WEIGHTS: own_state(state.model) if whole else _trained_weights(state),
        **averages,
        OPTIMIZER_STATE: optimizer,
        TIMESTEP_STATE: timesteps,
        **({} if state.aligned is None else {state.aligned.file: own_state(state.aligned.head)}),
    }
    return Checkpoint(
        step=state.step,
        tensors=tensors if state.shards is None else _own(tensors, state.shards),
        state={
            "config": result_fields(config),
            "cursor": _cursor(state.step, config, num_samples),
            "optimizer_groups": groups,
            "history": state.history.state(),
            "skipped": sorted(state.skipped),
            "rollbacks": state.rollbacks,
            "seconds": state.seconds,
            **({} if state.trained is None else {"base": state.base}),
        },
        model_config=_plain(state.model.config),
        score=score,
        regular=regular,
    )


def _own(tensors: Mapping[str, Mapping[str, Tensor]], shards: Shards | RowShards) -> dict[str, Mapping[str, Tensor]]:
    """What this rank has of a checkpoint's files. The optimizer's state is its own; the timesteps are rank 0's."""
    if isinstance(shards, RowShards):
        return {file: shards.written(values) for file, values in tensors.items()}
    own: dict[str, Mapping[str, Tensor]] = {}
    for file, values in tensors.items():
        prefix = _HEAD if file in (AlignedModel.file, GatedModel.file) else ""
        own[file] = {name: value for name, value in values.items() if shards.owns(f"{prefix}{name}")}
    timesteps = tensors[TIMESTEP_STATE] if shards.ranks.rank == 0 else {}
    return {**own, OPTIMIZER_STATE: tensors[OPTIMIZER_STATE], TIMESTEP_STATE: timesteps}


def _trained_weights(state: TrainState) -> dict[str, Tensor]:
    weights = own_state(state.model)
    return {name: value for name, value in weights.items() if state.trained is None or name in state.trained}


def _plain(config: ModelConfig) -> dict[str, Any]:
    """The configuration as read back from JSON: with lists instead of tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return plain


def _cursor(step: int, config: TrainConfig, num_samples: int) -> dict[str, int]:
    """The position in the data where the next step begins: epochs of `num_samples` follow one another."""
    position = step * config.global_batch_size
    epoch, place = divmod(position, num_samples) if num_samples else (0, 0)
    return {"position": position, "num_samples": num_samples, "epoch": epoch, "place": place}


def restore(state: TrainState, checkpoint: Checkpoint, config: TrainConfig, num_samples: int) -> None:
    """Load a checkpoint into a state. Raises UserError for one of another configuration or data set."""
    from edt_core.config import result_fields

    latents = "number of latents"
    saved = {**_plain(ModelConfig.from_dict(checkpoint.model_config)), **checkpoint.state["config"]}
    saved[latents] = checkpoint.state["cursor"]["num_samples"]
    require_same(saved, {**_plain(state.model.config), **result_fields(config), latents: num_samples})
    if state.rows is not None:
        cuts = {file: state.rows.cut(values) for file, values in checkpoint.tensors.items()}
        checkpoint = replace(checkpoint, tensors=cuts)
    tensors = checkpoint.tensors
    _load_weights(state, checkpoint)
    if state.aligned is not None:
        load_own(state.aligned.head, tensors[state.aligned.file])
    state.ema.load([tensors[name] for name in ema_files(config)])
    groups = checkpoint.state["optimizer_groups"]
    restore_state(state.optimizer, dict(tensors[OPTIMIZER_STATE]), groups, state.places)
    state.timesteps.load_state_dict({name: value.numpy() for name, value in tensors[TIMESTEP_STATE].items()})
    state.history = History.restored(checkpoint.state["history"])
    state.step = checkpoint.step
    state.skipped = set(checkpoint.state["skipped"])
    state.rollbacks, state.seconds = checkpoint.state["rollbacks"], checkpoint.state["seconds"]


def _load_weights(state: TrainState, checkpoint: Checkpoint) -> None:
    """Load all weights, or the delta of a training whose state has the base model already."""
    weights, base = checkpoint.tensors[MODEL_WEIGHTS], checkpoint.state.get("base")
    if state.trained is None or weights.keys() != state.trained:
        load_own(state.model, weights)
        state.base = base
        return
    if base != state.base:
        raise UserError(
            f"the checkpoint is of a training from the base model {str(base)[:12]}, and this training starts from "
            f"{str(state.base)[:12]}; resume with train.init_from of the checkpoint's training, or start a new one"
        )
    state.model.load_state_dict(weights, strict=False)

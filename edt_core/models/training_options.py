"""The training options in a released checkpoint, and whether its weights are compatible with the sampler here.

Keys and shapes do not show what a model predicts: a SiT has those of a DiT, but predicts a velocity. The sampler here
is that of DiT, EDT and MDTv2: the model predicts noise (epsilon) and a variance in the learned range, at 1,000
timesteps of the linear schedule. Names of options are those of the authors' code (facebookresearch/DiT,
xinwangChen/EDT, sail-sg/MDT, willisma/SiT) and common ones of other training code.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edt_core.errors import UserError
from edt_core.models.checkpoint_file import METADATA
from edt_core.models.config import ModelConfig
from edt_core.models.families import FAMILIES
from edt_core.models.zoo import MODEL_NAMES

_CONTAINERS = ("args", "config", "cfg", "hparams", "hyper_parameters", "options", "opts", "model_args", METADATA)
_NOISE = ("epsilon", "eps", "noise", "pred_noise", "pred_eps", "epsilon_prediction", "modelmeantype.epsilon")
Words = Mapping[str, str]  # word in the options for an objective other than noise prediction -> the objective's name
NO_WORDS: Words = {}
_OBJECTIVE = ("prediction", "prediction_type", "prediction_target", "parameterization", "objective", "model_mean_type")
_SCHEDULE = ("noise_schedule", "beta_schedule")
_EPS = ("sample_eps", "train_eps")
_OFF = ("predict_xstart", "predict_x0", "predict_v", "v_prediction", "v_pred", "velocity_prediction", "flow_matching")


@dataclass(frozen=True)
class _Rule:
    """The values of an option with which the weights are compatible, and the message for other values."""

    accepted: tuple[Any, ...]
    otherwise: str


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_OBJECTIVE, _Rule(_NOISE, "the model does not predict noise")),
    **dict.fromkeys(_OFF, _Rule((False,), "the model does not predict noise")),
    **dict.fromkeys(
        ("path_type", *_EPS, "interpolant", "transport", "sigma_data"),
        _Rule((), "it was trained on a continuous path from data to noise, as a SiT is, not on a noise schedule"),
    ),
    **dict.fromkeys(_SCHEDULE, _Rule(("linear",), "the noise schedule is another one")),
    **dict.fromkeys(("beta_start", "linear_start"), _Rule((0.0001,), "the noise schedule is another one")),
    **dict.fromkeys(("beta_end", "linear_end"), _Rule((0.02,), "the noise schedule is another one")),
    **dict.fromkeys(
        ("zero_terminal_snr", "rescale_betas_zero_snr"), _Rule((False,), "the noise schedule is another one")
    ),
    **dict.fromkeys(
        ("diffusion_steps", "num_timesteps", "num_train_timesteps", "num_diffusion_steps", "timesteps"),
        _Rule((1000,), "the noise schedule has another number of timesteps"),
    ),
    "timestep_respacing": _Rule((1000, ""), "it was trained on a part of the timesteps only"),
    "learn_sigma": _Rule((True,), "the model predicts no variance"),
    "class_cond": _Rule((True,), "the model takes no class labels"),
    "class_dropout_prob": _Rule((), ""),  # any share above 0, see _accepts
    **dict.fromkeys(("use_rope", "rope"), _Rule((False,), "attention rotates its queries and keys by position")),
}
_VELOCITY = "velocity"  # the word for the prediction of a SiT
# Of a velocity: the straight path of the default SiT. Its authors' code then sets both eps to 0, whatever they are.
_RULES_OF_VELOCITY: dict[str, _Rule] = {
    **{name: rule for name, rule in _RULES.items() if name not in _EPS},
    "path_type": _Rule(("linear",), "its path from noise to data is not the straight one"),
}
# Data, optimiser, loss weights, speed and logs; masking and the choice of timesteps in training; sampling.
_HARMLESS_NAMES = """
    amm amp atol batch_size cfg_scale checkpoint_path ckpt ckpt_every data_dir data_path device diffusion_form
    diffusion_norm dist_backend dist_on_itp dist_url distributed ema_decay ema_rate epochs feature_path features_path
    format fp16_scale_growth global_batch_size global_seed gpu grad_clip init_lr last_step last_step_size learning_rate
    likelihood local_rank log_every log_interval loss_type loss_weight lr lr_anneal_steps mask_ratio max_grad_norm
    max_steps microbatch mini_batch_size mixed_precision name num_classes num_workers output_dir precision rank
    rescale_learned_sigmas rescale_timesteps results_dir resume resume_checkpoint resume_step reverse rtol sample_every
    sampling_method save_interval schedule_sampler seed sigma_small tf32 use_fp16 use_kl wandb weight_decay workers
    world_size
"""
_HARMLESS = frozenset(_HARMLESS_NAMES.split())
_LATENT_SPACE = ("vae", "vae_path", "vae_model", "autoencoder", "first_stage_model", "scale_factor", "scaling_factor")
_USUAL_SPACE = re.compile(r"ema|mse|0\.18215|.*sd-vae-ft-(ema|mse).*")
_FIELDS = {  # options that correspond to a field of a model's configuration
    **dict.fromkeys(("image_size", "resolution", "img_size"), "image_size"),
    **dict.fromkeys(("input_size", "latent_size"), "latent_size"),
    **dict.fromkeys(("in_channels", "latent_channels"), "in_channels"),
    **dict.fromkeys(("decode_layer", "decode_layers"), "decode_depth"),
    **{name: name for name in ("patch_size", "depth", "num_heads", "mlp_ratio")},
    "hidden_size": "dim",
}
_MODEL_PARTS = frozenset(("model", "net", "network", "denoiser", "transformer", "params", "init_args", *_CONTAINERS))
_OF_SAMPLING = frozenset(  # sections about the use of the model, not about its training
    ("eval", "evaluation", "val", "validation", "test", "sample", "sampling", "sampler", "inference")
)
_MAX_DEPTH = 4
_SIT = re.compile(r"(?<![a-z])sit(?![a-z])", re.IGNORECASE)


class Option(NamedTuple):
    """One training option, by the last part of its name. `of_model`: not of a data set, autoencoder, ..."""

    name: str
    value: Any
    of_model: bool


@dataclass(frozen=True)
class TrainingOptions:
    """The options in a checkpoint; a name may occur more than once."""

    entries: tuple[Option, ...]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> TrainingOptions:
        """The options in a file's content; none in a bare state dict."""
        return cls(tuple(entry for name in _CONTAINERS for entry in _flat(content.get(name))))

    def objectives(self, words: Words = NO_WORDS) -> list[str]:
        """The objectives that the options name explicitly, each once; several contradict each other."""
        # `words` apply to the model's own options only: other sections may have a `prediction` of their own.
        named = [
            _objective_name(name, value, words if of_model else NO_WORDS) for name, value, of_model in self.entries
        ]
        objectives = list(dict.fromkeys(name for name in named if name is not None))
        stated = any(name == "predict_xstart" and value is not None for name, value, _ in self.entries)
        return objectives or (["epsilon"] if stated else [])  # predict_xstart is of DiT's code; if true, it is refused

    @property
    def state_schedule(self) -> bool:
        """Whether the options state explicitly that the noise schedule is the linear one."""
        return any(value is not None and _accepts(name, value) for name, value, _ in self.entries if name in _SCHEDULE)

    @property
    def other_latents(self) -> tuple[str, ...]:
        """The options, as name=value, for latents of another autoencoder than the papers'."""
        return tuple(
            f"{name}={_short(value)}"
            for name, value, _ in self.entries
            if name in _LATENT_SPACE and value is not None and not _USUAL_SPACE.fullmatch(str(value).lower())
        )

    @property
    def model_names(self) -> tuple[str, ...]:
        """The text values of the option `model`."""
        return tuple(
            option.value for option in self.entries if option.name == "model" and isinstance(option.value, str)
        )


def check_objective(path: Path, options: TrainingOptions, words: Words = NO_WORDS, stated: str | None = None) -> str:
    """The objective of the weights: `stated` by the user, or named by the options, or that of a SiT by its name.

    Noise prediction by default. Raises UserError if the options, or the file's name, indicate an objective that is not
    in `words`, and if two of them contradict each other.
    """
    named = options.objectives(words)
    velocity = is_velocity(path, options, words, stated)
    rules = _RULES_OF_VELOCITY if velocity else _RULES
    wrong = [
        (name, value)
        for name, value, of_model in options.entries
        if not _accepts(name, value, rules) and _objective_name(name, value, words if of_model else NO_WORDS) is None
    ]
    sit = [] if velocity else [name for name in options.model_names if _SIT.search(name)]
    if stated is not None and stated not in ("epsilon", *words.values()):
        raise UserError(f"{path}: unknown objective {stated!r}. Choose one of {', '.join(_names(words))}.")
    if stated is not None and named not in ([], [stated]):
        raise UserError(
            f"{path}: the given objective is {stated}, but its training options say {' and '.join(named)}. Leave the "
            "objective out, or remove a wrong option from the file."
        )
    if wrong or sit:
        settings = ", ".join([*(f"model={name!r}" for name in sit), *(f"{n}={_short(v)}" for n, v in wrong)])
        reasons = dict.fromkeys(["it is a SiT, which predicts a velocity"] if sit else [])
        reasons |= dict.fromkeys(rules[name].otherwise or "there is no null class for guidance" for name, _ in wrong)
        raise UserError(f"{path}: its training options have {settings}: {'; '.join(reasons)}. {needed(words)}")
    if len(named) > 1:
        raise UserError(
            f"{path}: its training options name {len(named)} objectives, {' and '.join(named)}, which contradict each "
            "other. Remove the wrong option from the file."
        )
    if velocity:
        return words[_VELOCITY]
    # "v" in the options does not exclude a SiT, since a velocity may be called v.
    if _SIT.search(path.name) and stated is None and named != ["epsilon"] and not _known_models(options):
        raise UserError(
            f"{path}: the file's name contains SiT, and nothing in the file contradicts it. A SiT has the keys of a "
            f"DiT but predicts a velocity. {needed(words)} If the file is not a SiT, rename it."
        )
    return stated or (named[0] if named else "epsilon")


def is_velocity(path: Path, options: TrainingOptions, words: Words, stated: str | None = None) -> bool:
    """Whether weights with DiT's keys are taken for those of a SiT, by what the user or the options say, or by a name.

    A name is that of the model in the options, or of the file if the options name no model of another kind. It counts
    only where nothing states another objective.
    """
    if _VELOCITY not in words:
        return False
    own, named = words[_VELOCITY], options.objectives(words)
    if stated is not None or named:
        return own in (stated, *named) and len({stated, *named} - {None}) == 1
    in_options = any(_SIT.search(name) for name in options.model_names)
    return in_options or (bool(_SIT.search(path.name)) and not _known_models(options))


def _names(words: Words) -> list[str]:
    return ["epsilon", *dict.fromkeys(words.values())]


def needed(words: Words) -> str:
    """The sentence of messages about which checkpoints are supported."""
    others = ", ".join(name for name in dict.fromkeys(words.values()) if name != words.get(_VELOCITY))
    return (
        f"edt samples models that predict noise (epsilon{f', or {others} if the options say so' if others else ''}) "
        "and a variance at 1,000 timesteps of the linear schedule, as the released EDT, DiT and MDTv2 do"
        f"{', or a velocity on the straight path, as the released SiT does' if _VELOCITY in words else ''}. Other "
        "objectives are not supported; import a model that was trained that way."
    )


def check_against_config(path: Path, options: TrainingOptions, config: ModelConfig) -> None:
    """Raise UserError if the options describe another model than keys and shapes do."""
    for name, value, of_model in options.entries:
        if not of_model:
            continue
        expected = getattr(config, _FIELDS.get(name, ""), None)
        if name in _FIELDS and None not in (value, expected) and not _same(value, expected):
            raise UserError(
                f"{path}: its training options have {name}={_short(value)}, but the weights fit {config.name} at "
                f"{config.image_size} pixels, with {name}={_short(expected)}. {_REMEDIES.get(name, _OTHER)}"
            )
        if name in ("num_classes", "n_classes"):
            _check_classes(path, value, config)
    other = [name for name in _known_models(options) if _plain(name) != _plain(config.name)]
    if other:
        raise UserError(
            f"{path}: its training options have model={other[0]!r}, but the weights fit {config.name}. {_OTHER}"
        )


def option_notes(options: TrainingOptions, config: ModelConfig, words: Words = NO_WORDS) -> list[str]:
    """Notes for the user about the options: what is assumed, and what was ignored."""
    notes = []
    if config.objective == words.get(_VELOCITY):
        notes.append(
            f"it is read as a SiT: {config.name} with the objective {config.objective}, without the half of its output "
            "that a SiT discards"
        )
        notes += [
            f"{name}={_short(value)} was ignored, as SiT's code ignores it for a velocity on the straight path"
            for name, value, _ in options.entries
            if name in _EPS and value
        ]
    elif not options.objectives(words) and not _known_models(options):
        notes.append(
            "the file does not say what its model predicts; noise (epsilon) prediction and 1,000 timesteps of the "
            f"linear schedule are assumed, as in the released {FAMILIES[config.architecture].title}"
        )
    models = _known_models(options)
    notes += [
        f"the file names its model {_short(name)}, which is not known here; its weights fit {config.name}"
        for name in dict.fromkeys(options.model_names)
        if name not in models
    ]
    notes += [
        f"it was trained on latents with {setting}; check that --autoencoder encodes to the same latents"
        for setting in options.other_latents
    ]
    if unknown := _unknown(options):
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        notes.append(f"training options that are not known here and were ignored: {', '.join(unknown[:10])}{more}")
    return notes


_OTHER = "Use a file whose options match its weights."
_FACTOR = "Only the autoencoder factor of the model's paper is supported."
_REMEDIES = dict.fromkeys(("image_size", "resolution", "img_size"), _FACTOR)


def _flat(value: Any, of_model: bool = True, depth: int = 0) -> Iterator[Option]:
    """All options in nested namespaces, dicts and JSON text."""
    for key, inner in _members(value).items():
        name = str(key).rsplit(".", 1)[-1].lower().replace("-", "_")
        if _members(inner):
            if depth < _MAX_DEPTH and name not in _OF_SAMPLING:
                yield from _flat(inner, of_model and name in _MODEL_PARTS, depth + 1)
        else:
            yield Option(name, _as_value(inner), of_model)


def _members(value: Any) -> Mapping[Any, Any]:
    """The items of a namespace, a dict, or a dict as JSON text; empty for any other value."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    return value if isinstance(value, Mapping) else {}


def _as_value(value: Any) -> Any:
    """An option's value in plain types. Text of a boolean, a number or null is converted.

    The metadata of safetensors, and the options of some training code, are text only.
    """
    if isinstance(value, list | tuple) and value and all(type(item) is int and item == value[0] for item in value):
        return value[0]  # an image size as height and width
    if not isinstance(value, str):
        return value if isinstance(value, bool | int | float | list | tuple | None) else repr(value)
    text = value.strip()
    if text.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(text.lower())
    try:
        return float(text) if re.fullmatch(r"[-+.\d][-+.\deE]*", text) else text
    except ValueError:
        return text


def _accepts(name: str, value: Any, rules: Mapping[str, _Rule] = _RULES) -> bool:
    """Whether the weights are compatible with an option's value. No value is accepted."""
    if name not in rules or value is None:
        return True
    if name == "class_dropout_prob":
        return not isinstance(value, int | float) or value > 0
    return any(_same(value, accepted) for accepted in rules[name].accepted)


def _objective_name(name: str, value: Any, words: Words) -> str | None:
    """The objective that an option names."""
    if name in _OBJECTIVE:
        text = str(value).lower()
        return words.get(text) or ("epsilon" if text in _NOISE else None)
    return words.get(name) if name in _OFF and _same(value, True) else None


def _same(value: Any, expected: Any) -> bool:
    if isinstance(value, str) and isinstance(expected, str):
        return value.lower() == expected
    if isinstance(value, bool) != isinstance(expected, bool):
        return bool(value == expected and value in (0, 1)) if isinstance(value, int) else False
    return bool((tuple(value) if isinstance(value, list) else value) == expected)


def _check_classes(path: Path, value: Any, config: ModelConfig) -> None:
    """Raise UserError unless `value` classes match the label table, which has one more row for the null class."""
    if value is None or _same(value, config.num_classes):
        return
    if _same(value, config.num_classes + 1):
        raise UserError(
            f"{path}: its label table has {config.num_classes + 1} rows for {value:.0f} classes, but {value + 1:.0f} "
            "are needed, the last one for the null class of guidance. Use a checkpoint of a training with class "
            "dropout."
        )
    raise UserError(
        f"{path}: its training options have num_classes={_short(value)}, but its label table has "
        f"{config.num_classes + 1} rows, for {config.num_classes} classes and the null class. {_OTHER}"
    )


def _known_models(options: TrainingOptions) -> list[str]:
    names = {_plain(name) for name in MODEL_NAMES}
    return [name for name in options.model_names if _plain(name) in names]


def _plain(name: str) -> str:
    """The name in a normal form, equal for `MDTv2_S_2` and `MDTv2-S/2`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _unknown(options: TrainingOptions) -> list[str]:
    names = {*_RULES, *_HARMLESS, *_LATENT_SPACE, *_FIELDS, "model", "num_classes", "n_classes"}
    return sorted({name[:40] for name, value, _ in options.entries if name not in names and value is not None})


def _short(value: Any) -> str:
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return repr(value)[:60]

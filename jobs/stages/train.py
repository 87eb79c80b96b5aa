"""train: a Ray Train DDP job that trains a model on latent shards and stores its checkpoints.

The loop is `edt_core.training.loop.train`; this file provides its ranks, its checkpoint store and its progress reports.
"""

import json
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from edt_core.config import TrainConfig
from edt_core.data.holdout import Holdout
from edt_core.errors import Stopped, StoreUnavailableError, UserError
from edt_core.evaluation.extractors import EXTRACTORS
from edt_core.files.small_files import read_text
from edt_core.progress import Progress
from edt_core.store.artifact import Artifact, ArtifactWriter
from edt_core.store.cache import local_directory
from edt_core.store.folder import Folder
from edt_core.store.layout import CHECKPOINTS, HISTORY_NAME, TRAIN_STATE
from jobs.runtime.cluster import free_place_of, is_own, require, use_threads
from jobs.runtime.devices import check_gpu_of_cluster
from jobs.runtime.pool import MAX_RETRIES
from jobs.runtime.verdict import device_full, has_verdict, memory_of, raise_verdict, remove_verdict, write_verdict
from jobs.stages.autoencoder import check_trained_scale, stored_scale
from jobs.stages.holdout.split import (
    class_counts,
    held_out,
    holdout_counts,
    remove_class_counts,
    training_images,
    write_class_counts,
)
from jobs.stages.stage import Stage
from jobs.stages.training.follow import ALONG, UNTIL, Follower, check_patience, followed, remove_enough
from jobs.stages.training.latents import check_latents, open_latents, open_tokens, rows_of_node, stream_text
from jobs.stages.training.prune import write_pruned
from jobs.stages.training.siblings import STEP_VERSION, go_on, resume_text, shared, warn_of_earlier
from jobs.stages.training.start import (
    check_start,
    initial_of,
    read_initial,
    remove_initial,
    trained_parameters,
    with_initial,
    write_initial,
    write_merged,
)

_RAY_RUN = ".ray-train"  # Ray Train's own folder inside the attempt; removed before the commit


def config_of(config: TrainConfig, latents: Mapping[str, Any], initial: Any = None) -> Any:
    """The ModelConfig of a training on latents with these counts, from the model `initial` if given. Raises UserError.

    A training that starts from a model keeps the statistics of that model's latents.
    """
    from edt_core.data.scale import normalised
    from edt_core.diffusion import with_objective
    from edt_core.models import model_config, with_trained_amm
    from edt_core.training.start.base import keep_statistics

    channels, side, _ = latents["latent_shape"]
    try:
        model = model_config(
            config.model,
            latents["image_size"],
            latents["classes"],
            autoencoder_factor=latents["image_size"] // side,
            latent_channels=channels,
            overrides=config.model_overrides,
            width=config.width,
        )
        model = with_trained_amm(with_objective(model, config.objective), config.amm_blocks)
        model.check_latents(latents)
        base = {} if initial is None else initial.model_config or {}
        if config.latent_norm and base.get("latents_mean") is None:
            model = normalised(model, latents)
        return model if initial is None else keep_statistics(initial.location, base, model)
    except ValueError as error:
        raise UserError(str(error)) from error


def train(
    config: TrainConfig, inputs: Mapping[str, Artifact], out: ArtifactWriter, progress: Progress
) -> dict[str, Any]:
    """Train a model on latent shards.

    Trains on `inputs["latents"]`, and resumes from the newest complete checkpoint of an earlier attempt with the same
    fingerprint. With an autoencoder among the inputs and `preview_every`, sample grids are drawn during training.
    With max_steps 0 the artifact is the untrained model of this seed. With a `holdout`, as settled, the images are
    needed: `inputs["images"]`, or those in the store of the latents.

    The evaluations along the training, a `Beside` among the inputs, begin while it trains. With `patience` they may end
    it: the last checkpoint of the artifact is then the one at which they did, however far the training was by then.
    With `prune` the model of the artifact is the one that the training started from, without the blocks that it chose.

    Raises Stopped after a requested stop, once a checkpoint is stored, DivergedError if losses or gradients are still
    not finite after `max_rollbacks` rollbacks, UserError for invalid latents or resources.
    """
    from edt_core.data.scale import LatentScale
    from edt_core.models import count_macs, count_parameters, overrides_record, shadow
    from edt_core.training.checkpoint import checkpoint_name
    from edt_core.training.optim import decay_start
    from edt_core.training.posthoc.snapshots import counts_of
    from edt_core.training.start.trainable import step_flops
    from edt_core.training.store import CheckpointStore, best_step
    from jobs.stages.training.context import device_seconds, remove_clock

    inputs, latents = with_initial(inputs), inputs["latents"]
    model_config = config_of(config, latents.counts, inputs.get("init"))
    _check(config, model_config, latents)
    check_start(config, "init" in inputs)
    check_patience(config, inputs)
    if "autoencoder" in inputs:
        remedy = f"remove the artifact {latents.folder.uri} and encode again"
        check_trained_scale(latents.counts, stored_scale(inputs["autoencoder"]), "the latents artifact", remedy)
    if config.preview_every is not None and "autoencoder" not in inputs:
        progress.warn(
            "preview_every is set, but there is no autoencoder to decode its samples: pass one (--autoencoder)"
        )
    holdout = held_out(config, inputs)
    images = latents.counts["images"] - (0 if holdout is None else len(holdout.rows))
    store = CheckpointStore(out, config.num_to_keep, progress.warn)
    store.stable_step, store.keep_every = decay_start(config, config.total_steps(images)), config.keep_every
    store.adopt()
    if store.newest() is None:
        go_on(config, _fingerprints(inputs), images, store, progress)
        if store.newest() is None:
            warn_of_earlier(config, _fingerprints(inputs), out, progress)
    initial = None
    reads_again = config.trainable != "all" or config.distill is not None or config.prune is not None
    if "init" in inputs and (reads_again or store.newest() is None):
        initial = initial_of(config, model_config, inputs, progress)
    ended: dict[str, Any] = {}
    if config.max_steps == 0:
        _store_untrained(config, model_config, store, initial)
    else:
        if initial is not None:
            write_initial(initial, out)
        ended = _fit_followed(config, {**inputs, "model_config": model_config}, out, progress, holdout, store, images)
        remove_initial(out)
    steps = store.prune(at_end=True)
    final = f"{CHECKPOINTS}/{checkpoint_name(steps[-1])}"
    rows = json.loads(out.data.read_bytes(f"{final}/{TRAIN_STATE}"))["history"]["rows"]
    _write_history(rows, out)
    if initial is not None and config.trainable != "all":
        final = write_merged(initial, local_directory(out.data.child(final)), model_config, out)
    trained_config, cut = model_config, dict[str, Any]()
    if initial is not None and config.prune is not None:
        last = local_directory(out.data.child(final))
        pruned = write_pruned(config, model_config, initial, last, latents, out, progress)
        final, model_config, cut = pruned.final, pruned.model_config, {"pruned": pruned.record}
    best = best_step(store.manifests())
    model = shadow(model_config)
    seen = steps[-1] * config.global_batch_size
    seconds = device_seconds(out)
    counts = class_counts(out, latents, holdout)
    remove_clock(out)
    remove_class_counts(out)
    return {
        "model": config.model,
        **({} if config.width is None else {"width": config.width}),
        **model_config.objective_record(),
        **overrides_record(model_config),
        "steps": steps[-1],
        "autoencoder_digest": latents.counts["autoencoder_digest"],
        **LatentScale.of(latents.counts).beyond_factor(),
        "class_counts": counts,  # what the label policy "prior" draws from
        **holdout_counts(config, holdout, latents, rows),
        "parameters": count_parameters(model),
        **trained_parameters(config, trained_config),
        **counts_of(config, store.snapshots),
        "macs": count_macs(model),
        "images_seen": seen,
        "training_flops": seen * step_flops(config, trained_config) if seen else 0,
        "device_hours": seconds / 3600,  # without the time of killed workers after their last row
        "checkpoints": [checkpoint_name(step) for step in steps],
        "final": final,
        "best": None if best is None else checkpoint_name(best),
        **cut,
        **ended,
    }


def _fit_followed(
    config: TrainConfig,
    inputs: Mapping[str, Any],
    out: ArtifactWriter,
    progress: Progress,
    holdout: Holdout | None,
    store: Any,
    images: int,
) -> dict[str, Any]:
    """Train, with the evaluations along the training beside it; what the counts say of a training that they ended.

    `images`: that are trained on.
    """
    beside = inputs.get(UNTIL) or inputs.get(ALONG)
    if beside is None:
        _fit(config, inputs, out, progress, holdout)
        return {}
    follower = Follower(beside, config, inputs, out, progress, holdout)
    with followed(follower):
        _fit(config, inputs, out, progress, holdout)
    last = follower.finish()
    remove_enough(out)
    if last is None:
        return {}
    store.end_at(last)
    progress.warn(
        f"the training ended at step {last} of {config.total_steps(images)}: {beside.metric} was not better in "
        f"{config.patience} evaluations (train.patience)"
    )
    return {"patience": {"metric": beside.metric, "evaluations": config.patience, "of": config.total_steps(images)}}


def _fingerprints(inputs: Mapping[str, Any]) -> dict[str, str]:
    """The inputs that change what a training makes."""
    return {role: item.fingerprint for role, item in inputs.items() if role not in STAGE.extras}


def _continues(
    folder: Folder, config: TrainConfig, inputs: Mapping[str, str], artifacts: Mapping[str, Artifact]
) -> str:
    checkpoints = shared(folder, config, inputs, training_images(config, artifacts))
    return resume_text(checkpoints[0]) if checkpoints else ""


def plan(config: TrainConfig, inputs: Mapping[str, Artifact]) -> str:
    """An estimate of what training on `inputs["latents"]` takes, as text."""
    from edt_core.training.estimate import estimate
    from edt_core.training.shard.cards import card_rows

    latents = inputs["latents"]
    config = config.settled(latents.counts["images"])
    model_config = config_of(config, latents.counts)
    _check(config, model_config, latents)
    images = training_images(config, inputs)
    needs = estimate(config, model_config, latents.counts["images"] if images is None else images)
    text = f"{needs}{card_rows(config, model_config)}"
    return f"{text}\n{stream_text(config, latents)}" if config.reader == "stream" else text


def _check(config: TrainConfig, model_config: Any, latents: Artifact) -> None:
    """Raise UserError for an invalid training, before any worker starts."""
    if config.seeds:
        raise UserError(f"seeds is {list(config.seeds)}, but this is one training: set seed, and train once for each")
    from edt_core.diffusion import check_training, objective_of
    from edt_core.models import check_masked_loss
    from edt_core.training.align.settings import align_settings
    from edt_core.training.optimizers.mup import check_mup
    from edt_core.training.prune.groups import groups_of
    from edt_core.training.speed.attention_table import attention_forms

    if config.max_steps > 0:  # an untrained model has no loss, so every recipe is valid
        check_masked_loss(model_config, config.masked_loss)
    objective_of(config.objective).schedule(config.num_timesteps)
    if config.max_steps > 0:
        check_training(config)
    attention_forms(config)
    align_settings(config, model_config)
    check_mup(config, model_config)
    if config.prune is not None:
        groups_of(model_config, config.prune)
    check_latents(config, latents)


def _store_untrained(config: TrainConfig, model_config: Any, store: Any, initial: Any) -> None:
    from edt_core.training.state import initial_state, to_checkpoint

    store.save(initial or to_checkpoint(initial_state(config, model_config), config, 0))
    store.flush()


def _write_history(rows: list[dict[str, float]], out: ArtifactWriter) -> None:
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    out.write_bytes(HISTORY_NAME, lines.encode(), len(rows))


def _fit(
    config: TrainConfig, inputs: Mapping[str, Any], out: ArtifactWriter, progress: Progress, holdout: Holdout | None
) -> None:
    """Run the loop on Ray Train's workers. A lost controller is restarted, as Ray Train restarts workers."""
    from ray.exceptions import ActorDiedError

    fewest, gpus = config.worker_range[0], float(config.use_gpu)
    require("train", CPU=fewest * config.num_cpus_per_worker, GPU=fewest * gpus)
    if config.use_gpu:
        check_gpu_of_cluster("train.use_gpu is true")
    job = {"config": config, "inputs": inputs, "out": out, "progress": progress, "holdout": holdout}
    remove_verdict(out)
    for run in range(1 + MAX_RETRIES):
        out.data.remove(_RAY_RUN)
        try:
            _in_thread(_trainer(config, job, f"run-{run}").fit)
            break
        except ActorDiedError as error:
            if run == MAX_RETRIES:
                raise
            progress.warn(f"Ray Train's controller was lost ({str(error).splitlines()[0]}); continuing with a new one")
            free_place_of(error.actor_id)
        except Exception:
            raise_verdict(out)
            raise
    out.data.remove(_RAY_RUN)
    raise_verdict(out)


def _trainer(config: TrainConfig, job: dict[str, Any], name: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from jobs.runtime.process_group import ManyMachinesConfig, OneMachineConfig

    torch_config = OneMachineConfig if is_own() else ManyMachinesConfig
    resources = {"CPU": config.num_cpus_per_worker, **({"GPU": 1.0} if config.use_gpu else {})}
    return TorchTrainer(
        _worker,
        train_loop_config=job,
        torch_config=torch_config(timeout_s=config.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,  # type: ignore[arg-type]  # a range is not in its annotations
            use_gpu=config.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=job["out"].data.child(_RAY_RUN).uri,
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )


def _in_thread(call: Callable[[], Any]) -> None:
    """Call in another thread and wait: in the main thread Ray Train would handle Ctrl-C itself, and abort."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="edt-ray-train", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _worker(job: Mapping[str, Any]) -> None:
    """The training function of each Ray Train worker.

    An error that another attempt cannot fix is recorded before it is raised: Ray Train restarts the workers after any
    error, and they find the record and end.
    """
    import ray.train.torch
    from torch import OutOfMemoryError

    from edt_core.data.streaming import TarStream
    from edt_core.training.loop import train as train_loop
    from edt_core.training.trainer import NotFiniteError
    from jobs.stages.training.context import RayContext

    config, inputs, out, progress = job["config"], job["inputs"], job["out"], job["progress"]
    holdout: Holdout | None = job["holdout"]
    if has_verdict(out):
        return
    use_threads(config.num_cpus_per_worker)
    try:
        context = RayContext(config, inputs, out, progress)
        latents = open_latents(config, inputs["latents"], progress, rows_of_node(config.global_batch_size))
        initial = partial(read_initial, out) if "init" in inputs else None
        if holdout is not None and context.ranks.rank == 0:
            assert not isinstance(latents, TarStream), "tars have no rows"
            write_class_counts(out, latents, inputs["latents"], holdout, inputs["model_config"].num_classes)
        tokens = open_tokens(config, inputs["latents"], progress)
        train_loop(config, inputs["model_config"], latents, context, initial, holdout, tokens)
    except (Stopped, NotFiniteError) as error:  # on every rank at the same step
        write_verdict(out, error)
    except StoreUnavailableError:  # the next attempt of Ray Train may reach it
        raise
    except UserError as error:  # on this rank, while others may wait for it
        write_verdict(out, error)
        raise
    except OutOfMemoryError:  # of a GPU: the next attempt would need as much
        workers, memory = ray.train.get_context().get_world_size(), memory_of(ray.train.torch.get_device())
        write_verdict(out, device_full(config, inputs["model_config"], workers, memory))
        raise


def history(checkpoint: Artifact) -> list[dict[str, float]]:
    """Rows of a checkpoint artifact's loss history, one every `log_every` steps; empty for an untrained model."""
    return [json.loads(line) for line in read_text(checkpoint.path(HISTORY_NAME)).splitlines()]


STAGE = Stage(
    "train",
    "checkpoint",
    STEP_VERSION,
    TrainConfig,
    train,
    roles=("latents",),
    optional=("init", UNTIL),
    extras=("autoencoder", "images", ALONG, "reference", *EXTRACTORS),
    plan=plan,
    continues=_continues,
    examples=(
        "./latents ./checkpoint --model EDT-S/2 --dry-run",
        "./latents ./checkpoint --model EDT-S/2 --num-workers 8 --use-gpu true --precision bf16",
    ),
)

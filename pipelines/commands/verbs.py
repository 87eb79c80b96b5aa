"""The verbs of `jobs/` as commands. Each has its own parser, one option a field of its configuration."""

import typer

# A verb prints its own help.
SETTINGS = {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}, "add_help_option": False}


def preprocess(context: typer.Context) -> None:
    """Turn labelled images into image shards: SOURCE OUT."""
    from jobs.preprocess import VERB

    VERB.main(context.args, "edt preprocess")


def encode(context: typer.Context) -> None:
    """Turn image shards into latent shards: IMAGES OUT --autoencoder PATH_OR_ID."""
    from jobs.encode import VERB

    VERB.main(context.args, "edt encode")


def train(context: typer.Context) -> None:
    """Train a model on latent shards: LATENTS OUT --model EDT-S/2."""
    from jobs.train import VERB

    VERB.main(context.args, "edt train")


def evaluate(context: typer.Context) -> None:
    """Sample from any model and measure it: MODEL OUT --images IMAGES --inception-weights FILE."""
    from jobs.evaluation import main

    main(context.args, "edt evaluate")


def amm_search(context: typer.Context) -> None:
    """Find where to modulate a model's attention, without training: MODEL OUT --images IMAGES."""
    from jobs.amm_search import main

    main(context.args, "edt amm-search")


def sample(context: typer.Context) -> None:
    """Draw images of chosen classes from any model into one picture: MODEL --classes otter,207 --out grid.png."""
    from jobs.draw import main

    main(context.args, "edt sample")


def export(context: typer.Context) -> None:
    """Write for other tools: FEATURES TARGET --format png|npz|webdataset, or MODEL FILE --format torch-export."""
    from jobs.export import main

    main(context.args, "edt export")


def bench(context: typer.Context) -> None:
    """Measure this machine: data, encode, train or eval, each figure beside a plain baseline."""
    from jobs.benchmark.command import main

    main(context.args, "edt bench")

"""What a pipeline is given: its source images, and the published and registered networks it takes as they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from edt_core.config import SourceConfig
from edt_core.evaluation.extractors import PUBLISHED_SPACES
from edt_core.models import ModelConfig
from edt_core.sampling.sampler import check_same_space
from edt_core.store.artifact import Source
from edt_core.store.folder import Folder
from edt_core.store.store import Store
from jobs.models.initial import Initial, initial_source, named_model
from jobs.stages import autoencoder, reference
from jobs.stages.extractors import extractor_source
from jobs.stages.preprocess import image_source
from jobs.stages.training.start import check_start
from pipelines.config.schema import PipelineConfig
from pipelines.pipeline.pruning import cut_start
from pipelines.registry.kept import Kept, kept_networks
from pipelines.setup.autoencoder_facts import own_statistics
from pipelines.terminal.terminal import Terminal


def prepare_source(config: SourceConfig, store: Folder, terminal: Terminal, digest_again: bool = False) -> Source:
    """The source images and their fingerprint. Raises UserError if there are no images to train on.

    With `digest_again` every image is read, even if its digest is cached.
    """
    from edt_core.data.digits import digits_folder, write_digits

    if config.kind == "digits":
        path = write_digits(digits_folder(store.local))
        config = SourceConfig(kind="image_folder", path=str(path), classes=config.classes, limit=config.limit)
    return image_source(config, terminal.source_progress(), digest_again)


@dataclass(frozen=True)
class Published:
    """The published inputs of a pipeline besides the images, each identified by its present content."""

    autoencoder: Source | None = None
    extractors: Mapping[str, Source] = field(default_factory=dict)
    statistics: Source | None = None
    initial: Mapping[str, Initial] = field(default_factory=dict)  # by model
    kept: Mapping[str, Kept] = field(default_factory=dict)  # networks of registered versions, by role
    tokens: Mapping[str, Source] = field(default_factory=dict)  # networks whose tokens are stored beside the latents
    guide: Source | None = None  # the model that samples are guided away from, if it is of another training

    @classmethod
    def of(
        cls, config: PipelineConfig, tracking_uri: str | None, store: Store | None = None, classes: tuple[str, ...] = ()
    ) -> "Published":
        """The inputs that the configuration names. Raises UserError if one is missing, with where to get it.

        Networks of registered versions are kept if their artifacts are in `store`. `classes`: those of the images.
        """
        used = {*config.extractors, *config.token_spaces()}
        networks = {space: config.network(space) for space in PUBLISHED_SPACES if space in used}
        sources = {space: extractor_source(space, s.weights, s.sha256, tracking_uri) for space, s in networks.items()}
        statistics = config.reference_statistics
        return cls(
            autoencoder.published_source(config.autoencoder, tracking_uri),
            {space: source for space, source in sources.items() if space in config.extractors},
            None if statistics is None else reference.statistics_source(statistics),
            {name: start for name in config.models if (start := _initial(config, name, tracking_uri)) is not None},
            {} if store is None else kept_networks(config, tracking_uri, store, classes),
            {space: sources[space] for space in config.token_spaces()},
            _guide(config, tracking_uri, len(classes)),
        )


def _guide(config: PipelineConfig, tracking_uri: str | None, classes: int) -> Initial | None:
    """The model of another training that samples are guided away from. Raises UserError if there is none that fits.

    `classes`: the number of classes of the images, 0 if it is not known yet.
    """
    if config.sample.guide_model is None:
        return None
    guide = named_model(config.sample.guide_model, "sample.guide", tracking_uri)
    if guide.model_config is not None:
        known = ModelConfig.from_dict(guide.model_config)
        for name in config.models:
            model = config.model_of(name, classes or known.num_classes)
            # The statistics of the latents are known once they are encoded.
            check_same_space(replace(model, latents_mean=known.latents_mean, latents_std=known.latents_std), known)
    return guide


def _initial(config: PipelineConfig, name: str, tracking_uri: str | None) -> Initial | None:
    """The model that the training of a registered model starts from. Raises UserError if there is none that fits."""
    start = initial_source(config.train_of(name), tracking_uri)
    check_start(config.train_of(name), start is not None)
    if start is not None:
        known = start if config.prune.keep is None else cut_start(start, config.prune.keep)
        known.check(config.model_of(name, 2), lambda: _normalises(config, name, tracking_uri))
    return start


def _normalises(config: PipelineConfig, name: str, tracking_uri: str | None) -> bool:
    """Whether a training is known to normalise its latents: it does unless its autoencoder already does."""
    location = config.autoencoder.pretrained
    return config.train_of(name).latent_norm and own_statistics(location, tracking_uri) is False

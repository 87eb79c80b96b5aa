"""The champion measured again: a gate that compares values of one protocol also after images or networks changed.

Values of two protocols cannot be compared. So before a decision, a champion with values of another protocol is sampled
with the sampling configuration and feature networks of the new version, and evaluated against its reference. Both are
ordinary steps: kept features of the same fingerprint are reused, so another reference alone costs seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edt_core.config import SampleConfig, result_fields
from edt_core.errors import UserError
from edt_core.evaluation.protocol import protocol_differences
from edt_core.store.artifact import Artifact, Source, sha256_json
from edt_core.store.folder import Folder
from edt_core.store.layout import CLASSES_NAME, MANIFEST_NAME
from jobs.models.open import Opened, open_model, use_mlflow
from jobs.models.registry_files import DIGEST_TAG, title
from jobs.runtime.cluster import cause_of
from jobs.stages import evaluate, sample
from pipelines.config.schema import PipelineConfig
from pipelines.engine.step import StepFuture
from pipelines.engine.steps import Steps
from pipelines.registry.aliases import DECISION_TAG, champion, champion_before, find_version
from pipelines.registry.gate import PROTOCOL_TAG, Remeasured, protocol_of
from pipelines.registry.registration import entry_of, identity_of
from pipelines.tracking.catalog import Catalog

# Each model decodes with its own autoencoder, which is part of its registered folder.
_OF_THE_MODEL = ("autoencoder",)
_CUT = ("keep_images", "unit_size")  # fields of sampling that are in no protocol


@dataclass
class ChampionMeasurement:
    """The steps that measure the champion of a model again, if its recorded values are of another protocol."""

    config: PipelineConfig
    name: str  # of the model
    steps: Mapping[str, StepFuture]  # of the new version, by role
    feature_networks: Mapping[str, StepFuture | Source]
    _version: Any = None
    _evaluation: StepFuture | None = None
    _problem: str = ""
    _protocol: Mapping[str, Any] = field(default_factory=dict)  # of the new version

    def call(self, steps: Steps, catalog: Catalog, artifacts: Mapping[str, Artifact] | None) -> Sequence[StepFuture]:
        """Call the steps, if there are any. In a plan `artifacts` is None: nothing is fetched or written."""
        version = self._compared(catalog, artifacts)
        if version is None:
            return ()
        self._version = version
        try:
            inputs = self._planned(version) if artifacts is None else self._inputs(catalog, version, artifacts)
        except (UserError, OSError) as error:
            self._problem = str(error)
            return ()
        features = steps.step(f"sample champion {self.name}", sample.STAGE, self.config.sample, **inputs)
        reference = self.steps["reference"]
        self._evaluation = steps.step(
            f"evaluate champion {self.name}",
            evaluate.STAGE,
            self.config.evaluate,
            features=features,
            reference=reference,
        )
        return features, self._evaluation

    def result(self) -> Remeasured | None:
        """What came of the steps; None if none was needed. A failure is a `problem`, not an error."""
        if self._version is None:
            return None
        number = str(self._version.version)
        if self._evaluation is None:
            return Remeasured(number, problem=self._problem)
        try:
            artifact = self._evaluation.result()
        except Exception as error:  # of a lost worker or a full disk a rerun may know nothing: no decision rests on it
            cause = cause_of(error)
            if not isinstance(cause, UserError):
                raise
            return Remeasured(number, problem=str(cause))
        differences = protocol_differences(_shared(artifact.counts["protocol"]), _shared(self._protocol))
        if differences:
            return Remeasured(number, problem=f"the protocols still differ in {', '.join(differences)}")
        return self._measured(number, artifact)

    def _measured(self, number: str, artifact: Artifact) -> Remeasured:
        metric = self.config.promote.metric
        values = artifact.counts["metrics"]
        if metric not in values:
            return Remeasured(number, problem=f"{metric} was not measured")
        changed = protocol_differences(_shared(protocol_of(self._version)), _shared(self._protocol))
        only_reference = all(text.startswith("reference") for text in changed)
        return Remeasured(
            number,
            metrics={name: float(values[name]) for name in (metric, f"{metric}_std") if name in values},
            repeats=self.config.sample.repeats,
            protocol=sha256_json(self._protocol),
            evaluation=artifact.fingerprint,
            uri=artifact.folder.uri,
            how="on the new reference" if only_reference else "by the new protocol",
        )

    def _compared(self, catalog: Catalog, artifacts: Mapping[str, Artifact] | None) -> Any | None:
        """The champion that the new version is compared with, if it has to be measured again; None if not."""
        if artifacts is None:
            version = champion(catalog, self.name)
            return None if version is None or self._has_these_inputs(version) else version
        entry = entry_of(artifacts)
        self._protocol = entry.evaluation.counts["protocol"]
        registered = find_version(catalog, self.name, identity_of(entry, self.config.promote))
        if registered is not None and DECISION_TAG in registered.tags:
            return None
        # A run that was killed between the alias and its decision has made the new version champion already.
        version = champion(catalog, self.name) if registered is None else champion_before(catalog, registered)
        return None if version is None or version.tags.get(PROTOCOL_TAG) == sha256_json(self._protocol) else version

    def _has_these_inputs(self, version: Any) -> bool:
        """Whether a champion was measured as the new version will be, as far as that shows before it is."""
        try:
            evaluation = Artifact.read(version.tags["edt.evaluation.uri"])
            features = Artifact.read(_beside(evaluation, "features"))
        except (UserError, OSError, KeyError):
            return False
        networks = {role: item.fingerprint for role, item in {**self.feature_networks, **self._guide()}.items()}
        then = {role: value for role, value in features.manifest.inputs.items() if role in {*networks, "guide"}}
        chain = result_fields(self.config.sample)
        before = result_fields(SampleConfig.model_validate(features.manifest.config))
        return (
            evaluation.manifest.inputs.get("reference") == self.steps["reference"].fingerprint
            and then == networks
            and all(chain.get(name) == before.get(name) for name in chain.keys() | before.keys() if name not in _CUT)
        )

    def _planned(self, version: Any) -> dict[str, StepFuture | Source]:
        """The inputs of the champion's samples as far as they are known without fetching its registered folder."""
        opened = _from_store(version)
        if opened is None:
            folder = Source(f"models:/{version.name}/{version.version}", version.tags.get(DIGEST_TAG, ""))
            return {"checkpoint": folder, "autoencoder": folder, **self.feature_networks, **self._guide()}
        return self._roles(version, opened)

    def _inputs(
        self, catalog: Catalog, version: Any, artifacts: Mapping[str, Artifact]
    ) -> dict[str, StepFuture | Source]:
        """The inputs of the champion's samples. Raises UserError if it cannot be measured by this configuration."""
        opened = _from_store(version, deep=True) or _from_registry(catalog, version, self.config.store)
        inputs = self._roles(version, opened)
        given: dict[str, Artifact | Source] = {"checkpoint": opened.checkpoint}
        for role, item in inputs.items():
            given[role] = item.result() if isinstance(item, StepFuture) else item
        self._check_size(opened, artifacts)
        sample.check(self.config.sample, given)
        return inputs

    def _roles(self, version: Any, opened: Opened) -> dict[str, StepFuture | Source]:
        assert opened.autoencoder is not None
        label = title(version)
        checkpoint, vae = opened.checkpoint, opened.autoencoder
        return {
            "checkpoint": StepFuture(label, "checkpoint", checkpoint.fingerprint, artifact=checkpoint),
            "autoencoder": StepFuture(label, "autoencoder", vae.fingerprint, artifact=vae),
            **self.feature_networks,
            **self._guide(),
        }

    def _guide(self) -> dict[str, StepFuture]:
        """The guide of the new version, which is part of the protocol of both."""
        return {"guide": self.steps["guide"]} if "guide" in self.steps else {}

    def _check_size(self, opened: Opened, artifacts: Mapping[str, Artifact]) -> None:
        """Raise UserError if values of the two models could not be compared, or the champion cannot be sampled so."""
        from edt_core.diffusion import objective_of
        from edt_core.models import ModelConfig

        both = (sample.model_config_of(item) for item in (artifacts["checkpoint"], opened.checkpoint))
        ours, theirs = (ModelConfig.from_dict(values) for values in both)
        if ours.image_size != theirs.image_size:
            raise UserError(
                f"its images have {theirs.image_size} px, and those of the new version {ours.image_size} px"
            )
        steps, timesteps = self.config.sample.num_sampling_steps, opened.checkpoint.manifest.config["num_timesteps"]
        if steps > (objective_of(theirs.objective).max_steps(timesteps) or steps):
            raise UserError(f"sample.num_sampling_steps is {steps}, and it was trained with {timesteps} timesteps")
        if self.config.promote.metric == "accuracy_classifier":
            classes = artifacts["images"].read_json(CLASSES_NAME)
            if opened.images is None or opened.images.read_json(CLASSES_NAME) != classes:
                raise UserError("it was trained on other classes, and the accuracy of a classifier depends on them")


def _shared(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a protocol that must be the same for two models."""
    return {name: value for name, value in protocol.items() if name not in _OF_THE_MODEL}


def _beside(artifact: Artifact, role: str) -> Folder:
    """The folder of an input of an artifact, in the same store."""
    *root, _, _ = artifact.folder.uri.split("/")
    return Folder.at("/".join(root)).child(f"{role}/{artifact.manifest.inputs[role]}")


def _from_store(version: Any, deep: bool = False) -> Opened | None:
    """The checkpoint that a version was registered from and its autoencoder, if both are there as they were.

    With `deep`, the sha256 of each file is compared.
    """
    uri, digest = version.tags.get("edt.uri"), version.tags.get("edt.digest")
    if uri is None or not Folder.at(uri).exists(MANIFEST_NAME):
        return None
    try:
        opened = open_model(uri, Folder.at(uri))
    except (UserError, OSError):
        return None
    if opened.autoencoder is None or opened.checkpoint.manifest.digest != digest:
        return None
    damaged = deep and any(item.problems(deep=True) for item in (opened.checkpoint, opened.autoencoder))
    return None if damaged else opened


def _from_registry(catalog: Catalog, version: Any, store: str) -> Opened:
    """A version's registered folder as artifacts in the store. Raises UserError if it is damaged."""
    location = f"models:/{version.name}/{version.version}"
    use_mlflow(location, catalog.tracking_uri, store)
    opened = open_model(location, Folder.at(store))
    if opened.autoencoder is None:
        raise UserError(f"{title(version)} has no autoencoder in its folder")
    return opened

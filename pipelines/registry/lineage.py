"""The lineage of a model: every artifact that it was made from, back to the raw images and published weights.

It comes from MLflow: the run of each step records the fingerprints of its inputs. If a run was deleted, it comes from
the manifest in the store.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from edt_core.errors import UserError
from edt_core.evaluation.extractors import PUBLISHED_SPACES
from edt_core.printing.table import SHORT
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.layout import KINDS
from edt_core.store.prefixes import PREFIX, fingerprints
from jobs.models.initial import INIT_CHECKPOINT_TAG, INIT_FROM_TAG, INIT_TAG
from jobs.models.names import STD_TAG
from jobs.models.registry_files import title
from jobs.stages.training.follow import UNTIL
from pipelines.registry.aliases import CHAIN_OF_TAG, GUIDE_CHECKPOINT_TAG, GUIDE_FROM_TAG, PARENT_TAG, QUANTIZED_OF_TAG
from pipelines.registry.lookup import all_aliases, find, origin_of, quantization_of
from pipelines.tracking.catalog import Catalog, flatten
from pipelines.tracking.runs import RUN_ID, experiments, runs_of, whole_run_id

_FINGERPRINT, _RUN = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{32}")
# Role of an input that no step makes -> the parameter of the workflow run with its location.
_LOCATIONS = {
    "source": "source.path",
    "published": "autoencoder.pretrained",
    **{space: f"{space}.weights" for space in PUBLISHED_SPACES},
}


@dataclass(frozen=True)
class Node:
    """An artifact, or an input that no step makes: source images, published weights."""

    kind: str
    fingerprint: str
    inputs: Mapping[str, str] = field(default_factory=dict)  # role -> fingerprint
    digest: str | None = None
    uri: str | None = None
    run: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    known_from: str = "mlflow"  # or manifest, given (from outside), nothing


@dataclass
class Lineage:
    """Everything that one model or artifact was made from. `root` is a fingerprint, or the name of a version."""

    root: str
    nodes: dict[str, Node] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"root": self.root, "nodes": {name: asdict(node) for name, node in self.nodes.items()}}

    def lines(self) -> Iterator[str]:
        """The tree, one line per artifact. An artifact that was shown above is only named."""
        shown: set[str] = set()

        def walk(role: str, name: str, depth: int) -> Iterator[str]:
            node = self.nodes[name]
            kind = node.kind if role in (node.kind, "") else f"{role} ({node.kind})"
            start = f"{'  ' * depth}{kind} {name if depth == 0 else name[:SHORT]}"
            if name in shown:
                yield f"{start}  (above)"
                return
            shown.add(name)
            yield "  ".join([start, *_details(node)])
            for inner, parent in node.inputs.items():
                yield from walk(inner, parent, depth + 1)

        return walk("", self.root, 0)


def lineage(catalog: Catalog, text: str, store: Folder | None = None) -> Lineage:
    """The lineage of a version (NAME@ALIAS, NAME/NUMBER, NAME), of a step's run, or of a fingerprint.

    A run or fingerprint may be given by its first digits, as tables show them. Manifests are read from
    `store` and from the stores of the version's artifacts. Raises UserError if `text` matches nothing.
    """
    walk = _Walk(catalog, experiments(catalog), [] if store is None else [store])
    if _FINGERPRINT.fullmatch(text):
        root = Node("", text)
    elif _RUN.fullmatch(text):
        root = _of_run(catalog, text)
    elif PREFIX.fullmatch(text) and (fingerprint := walk.whole(text)) is not None:
        root = Node("", fingerprint)
    elif RUN_ID.fullmatch(text) and text not in all_aliases(catalog) and (run := whole_run_id(catalog, text)):
        root = _of_run(catalog, run)
    else:
        return _of_version(walk, find(catalog, text))
    node = walk.artifact(root.kind, root.fingerprint)
    if node is None:
        raise UserError(
            f"no artifact {root.fingerprint} in MLflow or the store; `edt artifacts` lists those of a store"
        )
    walk.params = _parent_params(catalog, node.run)
    walk.add(node)
    return Lineage(node.fingerprint, walk.nodes)


@dataclass
class _Walk:
    """Visits every artifact once."""

    catalog: Catalog
    experiments: list[str]
    stores: list[Folder]
    params: Mapping[str, str] = field(default_factory=dict)  # of the workflow run
    nodes: dict[str, Node] = field(default_factory=dict)

    def add(self, node: Node) -> None:
        """Add a node and everything it was made from."""
        self.nodes[node.fingerprint] = node
        for role, parent in node.inputs.items():
            if parent not in self.nodes:
                self.add(self._input(node, role, parent))

    def artifact(self, kind: str, fingerprint: str) -> Node | None:
        """The node of an artifact from MLflow, or else from a manifest. An empty `kind` means any."""
        run_filter = f"tags.`edt.fingerprint` = '{fingerprint}' and attributes.status = 'FINISHED'"
        run_filter += f" and tags.`edt.kind` = '{kind}'" if kind else ""
        for run in self.catalog.client.search_runs(self.experiments, run_filter):
            tags = run.data.tags
            if {"edt.inputs", "edt.digest", "edt.uri"} <= tags.keys():
                self.remember(tags["edt.uri"])
                inputs = json.loads(tags["edt.inputs"])
                facts = tags["edt.digest"], tags["edt.uri"], run.info.run_id, dict(run.data.params)
                return Node(tags["edt.kind"], fingerprint, inputs, *facts)
        return self._of_manifest([kind] if kind else KINDS, fingerprint)

    def whole(self, prefix: str) -> str | None:
        """The fingerprint that begins with `prefix`; None if there is none, or if a model has this name.

        Raises UserError if there are several.
        """
        if prefix in all_aliases(self.catalog):
            return None
        run_filter = f"tags.`edt.fingerprint` LIKE '{prefix}%' and attributes.status = 'FINISHED'"
        found = {
            run.data.tags["edt.fingerprint"] for run in self.catalog.client.search_runs(self.experiments, run_filter)
        }
        found |= fingerprints(self.stores, prefix)
        if len(found) > 1:
            raise UserError(f"{len(found)} artifacts have a fingerprint that begins with {prefix}; give more digits")
        return next(iter(found), None)

    def remember(self, uri: str) -> None:
        """Add the store of an artifact: it may contain artifacts whose runs were deleted."""
        root = Folder.at(uri.rsplit("/", 2)[0])
        if root not in self.stores:
            self.stores.append(root)

    def _of_manifest(self, kinds: "list[str] | tuple[str, ...]", fingerprint: str) -> Node | None:
        for folder in [root.child(f"{kind}/{fingerprint}") for root in self.stores for kind in kinds]:
            try:
                artifact = Artifact.read(folder)
            except (UserError, OSError):
                continue
            manifest = artifact.manifest
            facts = dict(manifest.inputs), manifest.digest, folder.uri, manifest.mlflow_run_id
            return Node(manifest.kind, fingerprint, *facts, flatten(manifest.config), "manifest")
        return None

    def _input(self, node: Node, role: str, fingerprint: str) -> Node:
        statistics = self.params.get("reference_statistics", "None")
        if (node.kind, role) == ("reference", "images") and statistics != "None":
            return Node("published statistics", fingerprint, uri=statistics, known_from="given")
        if role in KINDS:
            # A guide may also be the checkpoint of a training.
            other = self.artifact("checkpoint", fingerprint) if role == "guide" else None
            return other or self.artifact(role, fingerprint) or Node(role, fingerprint, known_from="nothing")
        if role == "init":
            return self.artifact("checkpoint", fingerprint) or self._initial(node, fingerprint)
        if (node.kind, role) == ("guide", "model"):
            return self._guide(node, fingerprint)
        if role == UNTIL:
            return Node("evaluations along it", fingerprint, known_from="given")
        location = self.params.get(_LOCATIONS.get(role, ""), "None")
        if role == "source" and (kind := self.params.get("source.kind")):
            location = kind if location == "None" else f"{kind} {location}"
        kind = "source" if role == "source" else "published"
        return Node(kind, fingerprint, uri=None if location == "None" else location, known_from="given")

    def _initial(self, node: Node, fingerprint: str) -> Node:
        """The model that a training started from, and the checkpoint artifact that it is of, if that is known.

        The workflow run of the training's step says both.
        """
        tags = _parent_tags(self.catalog, node.run)
        digests = {key.removeprefix(f"{INIT_TAG}."): tag for key, tag in tags.items() if key.startswith(f"{INIT_TAG}.")}
        name = next((name for name, digest in digests.items() if digest == fingerprint), "")
        base = tags.get(f"{INIT_CHECKPOINT_TAG}.{name}")
        inputs = {"checkpoint": base} if base else {}
        return Node("model", fingerprint, inputs, uri=tags.get(f"{INIT_FROM_TAG}.{name}"), known_from="given")

    def _guide(self, node: Node, fingerprint: str) -> Node:
        """The model whose weights a guide has, and the checkpoint artifact that it is of, if that is known."""
        tags = _parent_tags(self.catalog, node.run)
        checkpoint = tags.get(GUIDE_CHECKPOINT_TAG)
        inputs = {"checkpoint": checkpoint} if checkpoint else {}
        return Node("model", fingerprint, inputs, uri=tags.get(GUIDE_FROM_TAG), known_from="given")


def _of_version(walk: _Walk, version: Any) -> Lineage:
    tags, name = version.tags, f"{version.name}/{version.version}"
    if origin := origin_of(version):
        return _of_import(name, version, origin)
    parents = {role: tags[f"edt.{role}"] for role in ("evaluation", "checkpoint") if f"edt.{role}" in tags}
    if not parents:
        raise UserError(f"{title(version)} was not registered by edt: it does not record its artifacts")
    if "edt.uri" in tags:
        walk.remember(tags["edt.uri"])
    run_id = _run_of_training(walk.catalog, version)
    run = runs_of(walk.catalog, [run_id]).get(run_id) if run_id else None
    walk.params = {} if run is None else run.data.params
    facts = tags.get("edt.pipeline_digest"), version.source, version.run_id
    average = {STD_TAG.removeprefix("edt."): tags[STD_TAG], "of": tags.get(PARENT_TAG)} if STD_TAG in tags else {}
    quantized = {key: text for key, text in quantization_of(version).items() if key in ("scheme", "of")}
    walk.add(Node("model", name, parents, *facts, config=average or quantized))
    return Lineage(name, walk.nodes)


def _run_of_training(catalog: Catalog, version: Any) -> str | None:
    """The run whose parameters describe a version's training: of a version made from another, that of the other."""
    of = (PARENT_TAG, QUANTIZED_OF_TAG, CHAIN_OF_TAG)
    if (parent := next((version.tags[tag] for tag in of if tag in version.tags), None)) is not None:
        name, _, number = parent.rpartition("/")
        with suppress(Exception):  # it was deleted
            return str(catalog.client.get_model_version(name, number).run_id)
    return str(version.run_id) if version.run_id else None


def _of_import(name: str, version: Any, origin: Mapping[str, str]) -> Lineage:
    """The lineage of an imported version: the file and the autoencoder."""
    released, autoencoder = origin["sha256"], origin["autoencoder_digest"]
    inputs = {"released": released, "autoencoder": autoencoder}
    digest = version.tags.get("edt.pipeline_digest")
    model = Node("model", name, inputs, digest, version.source, version.run_id)
    location = " ".join(filter(None, (origin["file"], origin["weights"], origin.get("source"))))
    nodes = [
        model,
        Node("published", released, uri=location, known_from="given"),
        Node("published", autoencoder, uri=origin["autoencoder"], known_from="given"),
    ]
    return Lineage(name, {node.fingerprint: node for node in nodes})


def _of_run(catalog: Catalog, run_id: str) -> Node:
    tags = {} if (run := runs_of(catalog, [run_id]).get(run_id)) is None else run.data.tags
    if "edt.fingerprint" not in tags:
        raise UserError(f"the run {run_id} has no artifact; give the run of a finished step, or a version")
    return Node(tags["edt.kind"], tags["edt.fingerprint"])


def _parent_params(catalog: Catalog, run_id: str | None) -> Mapping[str, str]:
    """The parameters of the workflow run that a step's run belongs to."""
    run = _parent(catalog, run_id)
    return {} if run is None else run.data.params


def _parent_tags(catalog: Catalog, run_id: str | None) -> Mapping[str, str]:
    """The tags of the workflow run that a step's run belongs to."""
    run = _parent(catalog, run_id)
    return {} if run is None else run.data.tags


def _parent(catalog: Catalog, run_id: str | None) -> Any | None:
    run = runs_of(catalog, [run_id]).get(run_id) if run_id else None
    parent = None if run is None else run.data.tags.get("mlflow.parentRunId")
    return runs_of(catalog, [parent]).get(parent) if parent else None


def _details(node: Node) -> list[str]:
    """The details of a node that its line shows after its name."""
    if node.known_from == "given":
        return [node.uri] if node.uri else []
    if node.known_from == "nothing":
        return ["not recorded in MLflow or the store"]
    details = [f"digest {node.digest[:SHORT]}"] if node.digest else []
    details += [f"run {node.run}"] if node.run else []
    details += ["(from its manifest; its run was deleted)"] if node.known_from == "manifest" else []
    changed = _changed(node)
    return details + ([", ".join(f"{name}={value}" for name, value in changed.items())] if changed else [])


def _changed(node: Node) -> dict[str, str]:
    """The fields of a step's configuration that differ from their defaults; of a version, how it was averaged."""
    from edt_core import config as sections
    from edt_core.evaluation.config import EvaluateConfig

    section = {
        "images": sections.PreprocessConfig,
        "autoencoder": sections.AutoencoderConfig,
        "latents": sections.EncodeConfig,
        "classifier": sections.ClassifierConfig,
        "checkpoint": sections.TrainConfig,
        "reference": sections.ReferenceConfig,
        "features": sections.SampleConfig,
        "guide": sections.GuideConfig,
        "evaluation": EvaluateConfig,
    }.get(node.kind)
    if section is None:
        return {name: str(value) for name, value in node.config.items()} if node.kind == "model" else {}
    defaults = {name: str(value) for name, value in flatten(sections.result_fields(section())).items()}
    return {name: str(value) for name, value in node.config.items() if defaults.get(name, str(value)) != str(value)}

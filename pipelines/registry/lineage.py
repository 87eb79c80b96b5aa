"""Where a model comes from: every artifact behind it, back to the raw images and what was published elsewhere.

From MLflow: the run of each step has the fingerprints of its inputs. Where a run is gone, from the store's manifest.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from edt_core.errors import UserError
from edt_core.evaluation.extractors import PUBLISHED_SPACES
from edt_core.store.artifact import Artifact
from edt_core.store.folder import Folder
from edt_core.store.layout import KINDS
from jobs.models.registry_files import title
from pipelines.registry.lookup import find, origin_of
from pipelines.tracking.catalog import Catalog, flatten
from pipelines.tracking.runs import experiments, runs_of

_FINGERPRINT, _RUN = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{32}")
_SHORT = 12  # digits of a fingerprint that people read
# Role of what no step made -> the parameter of the workflow run that says where it was.
_LOCATIONS = {
    "source": "source.path",
    "published": "autoencoder.pretrained",
    **{space: f"{space}.weights" for space in PUBLISHED_SPACES},
}


@dataclass(frozen=True)
class Node:
    """An artifact, or what no step has made: images as they came, published weights."""

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
    """All that is behind one model or artifact. `root` is a fingerprint, or the name of a version."""

    root: str
    nodes: dict[str, Node] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"root": self.root, "nodes": {name: asdict(node) for name, node in self.nodes.items()}}

    def lines(self) -> Iterator[str]:
        """The tree, an artifact a line; what stands further up already is named and not told again."""
        shown: set[str] = set()

        def walk(role: str, name: str, depth: int) -> Iterator[str]:
            node = self.nodes[name]
            kind = node.kind if role in (node.kind, "") else f"{role} ({node.kind})"
            start = f"{'  ' * depth}{kind} {name if depth == 0 else name[:_SHORT]}"
            if name in shown:
                yield f"{start}  (above)"
                return
            shown.add(name)
            yield "  ".join([start, *_told(node)])
            for inner, needed in node.inputs.items():
                yield from walk(inner, needed, depth + 1)

        return walk("", self.root, 0)


def lineage(catalog: Catalog, text: str, store: Folder | None = None) -> Lineage:
    """The lineage of a version (NAME@ALIAS, NAME/NUMBER, NAME), of a step's run, or of a fingerprint.

    Manifests are looked for in `store` and where the version's artifacts lie. Raises UserError where there is no such
    thing.
    """
    walk = _Walk(catalog, experiments(catalog), [] if store is None else [store])
    if _FINGERPRINT.fullmatch(text):
        root = Node("", text)
    elif _RUN.fullmatch(text):
        root = _of_run(catalog, text)
    else:
        return _of_version(walk, find(catalog, text))
    found = walk.artifact(root.kind, root.fingerprint)
    if found is None:
        raise UserError(f"MLflow and the store know no artifact {root.fingerprint}; give a whole fingerprint")
    walk.params = _parent_params(catalog, found.run)
    walk.add(found)
    return Lineage(found.fingerprint, walk.nodes)


@dataclass
class _Walk:
    """Visits every artifact once."""

    catalog: Catalog
    experiments: list[str]
    stores: list[Folder]
    params: Mapping[str, str] = field(default_factory=dict)  # of the workflow run
    nodes: dict[str, Node] = field(default_factory=dict)

    def add(self, node: Node) -> None:
        """A node and all that it was made from."""
        self.nodes[node.fingerprint] = node
        for role, needed in node.inputs.items():
            if needed not in self.nodes:
                self.add(self._input(node, role, needed))

    def artifact(self, kind: str, fingerprint: str) -> Node | None:
        """What MLflow, or else a manifest, says of an artifact; of any kind where that is empty."""
        wanted = f"tags.`edt.fingerprint` = '{fingerprint}' and attributes.status = 'FINISHED'"
        wanted += f" and tags.`edt.kind` = '{kind}'" if kind else ""
        for run in self.catalog.client.search_runs(self.experiments, wanted):
            tags = run.data.tags
            if {"edt.inputs", "edt.digest", "edt.uri"} <= tags.keys():
                self.remember(tags["edt.uri"])
                inputs = json.loads(tags["edt.inputs"])
                facts = tags["edt.digest"], tags["edt.uri"], run.info.run_id, dict(run.data.params)
                return Node(tags["edt.kind"], fingerprint, inputs, *facts)
        return self._of_manifest([kind] if kind else KINDS, fingerprint)

    def remember(self, uri: str) -> None:
        """The store that an artifact lies in may hold others that have no run any more."""
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
            return self.artifact(role, fingerprint) or Node(role, fingerprint, known_from="nothing")
        where = self.params.get(_LOCATIONS.get(role, ""), "None")
        if role == "source" and (kind := self.params.get("source.kind")):
            where = kind if where == "None" else f"{kind} {where}"
        kind = "source" if role == "source" else "published"
        return Node(kind, fingerprint, uri=None if where == "None" else where, known_from="given")


def _of_version(walk: _Walk, version: Any) -> Lineage:
    tags, name = version.tags, f"{version.name}/{version.version}"
    if origin := origin_of(version):
        return _of_import(name, version, origin)
    parents = {role: tags[f"edt.{role}"] for role in ("evaluation", "checkpoint") if f"edt.{role}" in tags}
    if not parents:
        raise UserError(f"{title(version)} was not registered by edt: it does not say what it was made from")
    if "edt.uri" in tags:
        walk.remember(tags["edt.uri"])
    run = runs_of(walk.catalog, [version.run_id]).get(version.run_id) if version.run_id else None
    walk.params = {} if run is None else run.data.params
    walk.add(Node("model", name, parents, tags.get("edt.pipeline_digest"), version.source, version.run_id))
    return Lineage(name, walk.nodes)


def _of_import(name: str, version: Any, origin: Mapping[str, str]) -> Lineage:
    """An imported version: the file, and the autoencoder that was put to it."""
    released, autoencoder = origin["sha256"], origin["autoencoder_digest"]
    inputs = {"released": released, "autoencoder": autoencoder}
    digest = version.tags.get("edt.pipeline_digest")
    model = Node("model", name, inputs, digest, version.source, version.run_id)
    where = " ".join(filter(None, (origin["file"], origin["weights"], origin.get("source"))))
    nodes = [
        model,
        Node("published", released, uri=where, known_from="given"),
        Node("published", autoencoder, uri=origin["autoencoder"], known_from="given"),
    ]
    return Lineage(name, {node.fingerprint: node for node in nodes})


def _of_run(catalog: Catalog, run_id: str) -> Node:
    tags = {} if (run := runs_of(catalog, [run_id]).get(run_id)) is None else run.data.tags
    if "edt.fingerprint" not in tags:
        raise UserError(f"the run {run_id} is of no step that made an artifact; give a step's run or a version")
    return Node(tags["edt.kind"], tags["edt.fingerprint"])


def _parent_params(catalog: Catalog, run_id: str | None) -> Mapping[str, str]:
    """The parameters of the workflow run that a step's run belongs to."""
    run = runs_of(catalog, [run_id]).get(run_id) if run_id else None
    parent = None if run is None else run.data.tags.get("mlflow.parentRunId")
    found = runs_of(catalog, [parent]).get(parent) if parent else None
    return {} if found is None else found.data.params


def _told(node: Node) -> list[str]:
    """What a line says of a node beside its name."""
    if node.known_from == "given":
        return [node.uri] if node.uri else []
    if node.known_from == "nothing":
        return ["no record of it in MLflow or the store"]
    details = [f"digest {node.digest[:_SHORT]}"] if node.digest else []
    details += [f"run {node.run}"] if node.run else []
    details += ["(from its manifest, its run is gone)"] if node.known_from == "manifest" else []
    changed = _changed(node)
    return details + ([", ".join(f"{name}={value}" for name, value in changed.items())] if changed else [])


def _changed(node: Node) -> dict[str, str]:
    """The fields of a step's configuration that are not as they are by default."""
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
        "evaluation": EvaluateConfig,
    }.get(node.kind)
    if section is None:
        return {}
    usual = {name: str(value) for name, value in flatten(sections.result_fields(section())).items()}
    return {name: str(value) for name, value in node.config.items() if usual.get(name, str(value)) != str(value)}

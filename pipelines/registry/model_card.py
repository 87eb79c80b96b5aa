"""The model card: README.md of a registered model, with metadata for model hubs in its front matter.

The metadata (https://huggingface.co/docs/hub/model-cards): license, library, task, tags, and `model-index` with the
metrics.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edt_core.diffusion import objective_of_model
from edt_core.evaluation.metrics import in_order
from edt_core.evaluation.protocol import comparison_table
from edt_core.models import FAMILIES, ModelConfig, overrides_record

README = "README.md"
_TASK = "unconditional-image-generation"  # hubs have no task for class-conditional images
_UNKNOWN_LICENSE = (
    "Not stated. Set `promote.license` in the configuration of the run, or `--license` of `edt import`, to the "
    "identifier of a license, such as apache-2.0. The training images, the autoencoder and published weights may have "
    "other licenses."
)


@dataclass(frozen=True)
class ModelCard:
    """The contents of a card. Empty sections are omitted; a missing license or missing metrics are stated.

    `data`, `training` and `origin` are facts by name, shown unchanged; `sampling` are fields of ChainConfig.
    """

    name: str
    config: ModelConfig
    parameters: int
    macs: int
    sampling: Mapping[str, Any]
    license: str | None = None
    dataset: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The whole card as Markdown with YAML front matter."""
        sections = [self._model(), self._metrics(), *self._facts(), self._use(), self._license()]
        return "\n\n".join([self._front_matter(), f"# {self.name}", *sections]) + "\n"

    def _front_matter(self) -> str:
        import yaml

        architecture = self.config.architecture
        paper = FAMILIES[architecture].paper.replace("arXiv ", "arxiv:")
        fields: dict[str, Any] = {
            "license": self.license or "unknown",
            "library_name": "diffusers",
            "pipeline_tag": _TASK,
            "tags": ["class-conditional", self._kind("transformer").replace(" ", "-"), architecture, paper],
        }
        if self.metrics:
            result = {
                "task": {"type": _TASK},
                "dataset": {"name": self.dataset or "not stated", "type": "images"},
                "metrics": [
                    {"type": name, "value": float(self.metrics[name]), "name": name} for name in in_order(self.metrics)
                ],
            }
            fields["model-index"] = [{"name": self.name, "results": [result]}]
        return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"

    def _model(self) -> str:
        family, objective = FAMILIES[self.config.architecture], objective_of_model(self.config)
        size, latent = self.config.image_size, self.config.latent_size
        overrides = overrides_record(self.config).get("model_overrides", {})
        facts = {
            "architecture": f"{self.config.name}: {family.long_name} ({family.paper})",
            **({"differs from that model": overrides} if overrides else {}),
            "predicts": f"{objective.meaning} (prediction type {objective.prediction_type})",
            "parameters": f"{self.parameters:,}",
            "multiply-accumulates": f"{self.macs:,} per image and step",
            "images": f"{size} x {size} px of {self.config.num_classes:,} classes",
            "latents": f"{self.config.in_channels} x {latent} x {latent}, a factor of {self.config.autoencoder_factor}"
            f"{'' if self.config.latents_mean is None else ', normalised by channel'}",
        }
        return f"Class-conditional images by {self._kind()}.\n\n{_table(facts)}"

    def _kind(self, noun: str = "") -> str:
        """How the model makes images, or with a noun, what it is."""
        if objective_of_model(self.config).of_tokens:
            return f"masked token {noun}" if noun else "masked tokens"
        return f"diffusion {noun}" if noun else "latent diffusion"

    def _metrics(self) -> str:
        if not self.metrics:
            return "## Metrics\n\nNot measured. `edt evaluate` measures them for any model."
        metrics = {name: self.metrics[name] for name in in_order(self.metrics)}
        table = comparison_table({"value": {"metrics": metrics, "protocol": self.protocol}}).partition("\n\n")[0]
        protocol = _table(self.protocol) if self.protocol else "Not recorded."
        return (
            f"## Metrics\n\n{table}\n\nValues are comparable only under the same protocol. The protocol:\n\n{protocol}"
        )

    def _facts(self) -> list[str]:
        tables = {"Data": self.data, "Training": self.training, "Origin": self.origin}
        return [f"## {heading}\n\n{_table(facts)}" for heading, facts in tables.items() if facts]

    def _use(self) -> str:
        return (
            "## Use\n\n"
            "```python\n"
            "from edt_core import EDTPipeline\n\n"
            'pipeline = EDTPipeline.from_pretrained("FOLDER")    # this folder\n'
            "images = pipeline([0, 1], seed=0).images            # one image per class label\n\n"
            "import torch\n"
            "from diffusers import DiffusionPipeline             # or through diffusers, here in bfloat16\n\n"
            "pipeline = DiffusionPipeline.from_pretrained(\n"
            '    "FOLDER", custom_pipeline="FOLDER", trust_remote_code=True, torch_dtype=torch.bfloat16\n'
            ")\n\n"
            "import mlflow, numpy\n\n"
            f'mlflow.pyfunc.load_model("models:/{self.name}/VERSION").predict(numpy.array([0, 1]))\n'
            "```\n\n"
            f"    edt sample {self.name}/VERSION --num 4 --out samples.png\n\n"
            "Default sampling settings, which `model_index.json` contains as well:\n\n"
            f"{_table(self.sampling)}"
        )

    def _license(self) -> str:
        return f"## License\n\n{self.license or _UNKNOWN_LICENSE}"


def _table(facts: Mapping[str, Any]) -> str:
    """Facts as a Markdown table: None is shown as "not set", nested facts have dotted names."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in _flat(facts).items())])


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _cell(value: Any) -> str:
    if value is None:
        return "not set"
    text = ", ".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")

"""The record of one step in its MLflow run: metrics by step, pictures, checkpoints, warnings.

Every method is idempotent. After a lost server answer, worker or driver, the same call is repeated.
"""

import io
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edt_core.printing.redaction import redacted
from edt_core.store.artifact import Artifact, canonical_json
from edt_core.store.layout import STEP_PREFIX
from jobs.runtime.board import Measured, Picture
from pipelines.tracking.catalog import Catalog, flatten, paged
from pipelines.tracking.wandb_mirror import WandbMirror

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Metric


_MAX_METRICS = 1000  # of one `log_batch`
_MAX_WARNINGS = 5000  # characters of a tag's value that every MLflow back end accepts
_PICTURE = re.compile(r"images/(.+)[+%]step[+%](\d+)[+%]timestamp[+%].*[+%]compressed\.webp")  # as `log_image` names it


class RunRecord:
    """Writes to one run. Its existing contents, for example from an earlier driver, are read once, when needed."""

    def __init__(self, catalog: Catalog, run_id: str, mirror: WandbMirror | None = None) -> None:
        self.catalog, self.run_id, self.mirror = catalog, run_id, mirror
        self._metrics: dict[int, dict[str, Metric]] | None = None  # step -> name -> metric in the run
        self._pictures: set[tuple[str, int]] | None = None
        self._warnings: list[str] | None = None
        self._models: dict[int, str] = {}  # step -> id of the checkpoint's logged model
        self._linked: set[tuple[str, str]] = set()  # (model id, metric name)

    def artifact(self, artifact: Artifact) -> None:
        """Tag the run with its artifact, and log the artifact's counts as metrics.

        For a checkpoint artifact, also add missing metrics from its history, and its checkpoints as logged models.
        """
        manifest = artifact.manifest
        self.catalog.set_tags(self.run_id, artifact_tags(artifact))
        numbers = {k: v for k, v in flatten(manifest.counts).items() if isinstance(v, int | float)}
        numbers["duration_s"] = manifest.duration_s
        self.catalog.log_metrics(self.run_id, numbers)
        if self.mirror is not None:
            self.mirror.summary(numbers)
        if manifest.kind == "checkpoint":
            self.complete(artifact)

    def metrics(self, rows: Sequence[Measured]) -> None:
        """Log finite values under their step and time of measurement.

        A step has one value per name: values that a training measures again after a restart are not logged again.
        """
        from mlflow.entities import Metric

        logged = self._logged_metrics()
        new: dict[tuple[int, str], Metric] = {}
        for row in rows:
            for name, value in row.values.items():
                if math.isfinite(value) and name not in logged.get(row.step, {}):
                    new.setdefault((row.step, name), Metric(name, float(value), row.time_ms, row.step))
        for batch in _batches(list(new.values())):
            self.catalog.client.log_batch(self.run_id, metrics=batch)
            for metric in batch:
                logged.setdefault(metric.step, {})[metric.key] = metric
            if self.mirror is not None:
                self.mirror.metrics((metric.key, metric.value, metric.step) for metric in batch)
        self._link({row.step for row in rows})

    def picture(self, picture: Picture) -> None:
        """Log a PNG so that MLflow's run page shows it by step. Raises MlflowException if it is not an image."""
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES

        key = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", picture.name)
        image, client = _decoded(picture), self.catalog.client
        if (key, picture.step) in self._logged_pictures():
            client.set_tag(self.run_id, MLFLOW_LOGGED_IMAGES, True)  # the last part of `log_image` may be missing
            return
        self._pictures = None  # after an error it is unknown whether the run has the picture
        client.log_image(self.run_id, image, key=key, step=picture.step, timestamp=picture.time_ms, synchronous=True)

    def checkpoints(self, checkpoints: Mapping[int, tuple[str, str]]) -> None:
        """Make the run's logged models equal to these checkpoints, step -> (URI, digest), with their step's metrics."""
        models: dict[int, LoggedModel] = {}
        for model in self._checkpoint_models():
            step = int(model.params["step"])
            if step not in checkpoints or step in models:
                self.catalog.client.delete_logged_model(model.model_id)
            else:
                models[step] = model
        self._models = {step: self._model(step, *checkpoints[step], models.get(step)) for step in sorted(checkpoints)}
        self._link(checkpoints)

    def warnings(self, messages: Iterable[str]) -> None:
        """Append lines to the tag `edt.warnings`. If it is too long, the oldest lines are dropped."""
        if self._warnings is None:
            warnings = self.catalog.client.get_run(self.run_id).data.tags.get("edt.warnings", "")
            self._warnings = warnings.splitlines()
        lines = [*self._warnings, *(" ".join(message.split()) for message in messages)]
        text = "\n".join(lines)
        if len(text) > _MAX_WARNINGS:
            text = "...\n" + text[len(text) - _MAX_WARNINGS + 4 :].partition("\n")[2]
        self.catalog.set_tags(self.run_id, {"edt.warnings": text})
        self._warnings = lines

    def complete(self, artifact: Artifact) -> None:
        """Log the metrics of a checkpoint artifact's history that the run lacks, and set the run's checkpoints."""
        from jobs.stages.train import history

        now = int(time.time() * 1000)
        rows = [dict(row) for row in history(artifact)]
        self.metrics([Measured(row, int(row.pop("step")), now) for row in rows])
        names = {int(name.removeprefix(STEP_PREFIX)): name for name in artifact.counts["checkpoints"]}
        uri, digest = artifact.data.uri, artifact.manifest.digest
        self.checkpoints({step: (f"{uri}/checkpoints/{name}", digest) for step, name in names.items()})

    def _model(self, step: int, uri: str, digest: str, existing: "LoggedModel | None") -> str:
        """The id of a checkpoint's logged model, which is created or completed if necessary."""
        client, tags = self.catalog.client, {"edt.uri": redacted(uri), "edt.digest": digest}
        model = existing or client.create_logged_model(
            self.catalog.experiment_id,
            name=f"{STEP_PREFIX}{step:08d}",
            source_run_id=self.run_id,
            tags=tags,
            params={"step": str(step)},
        )
        if any(model.tags.get(key) != value for key, value in tags.items()):
            client.set_logged_model_tags(model.model_id, tags)
        if str(model.status) != "READY":
            client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _link(self, steps: Iterable[int]) -> None:
        """Log the metrics of these steps for the logged models of their checkpoints as well."""
        from mlflow.entities import Metric

        for step in steps:
            model = self._models.get(step)
            if model is None:
                continue
            new = [m for name, m in self._logged_metrics().get(step, {}).items() if (model, name) not in self._linked]
            for batch in _batches(new):
                linked = [Metric(m.key, m.value, m.timestamp, m.step, model_id=model) for m in batch]
                self.catalog.client.log_batch(self.run_id, metrics=linked)
                self._linked |= {(model, metric.key) for metric in batch}

    def _logged_metrics(self) -> "dict[int, dict[str, Metric]]":
        if self._metrics is None:
            client, metrics = self.catalog.client, dict[int, dict[str, "Metric"]]()
            for name in client.get_run(self.run_id).data.metrics:
                for metric in client.get_metric_history(self.run_id, name):
                    metrics.setdefault(metric.step, {})[name] = metric
            self._metrics = metrics
        return self._metrics

    def _logged_pictures(self) -> set[tuple[str, int]]:
        if self._pictures is None:
            paths = [file.path for file in self.catalog.client.list_artifacts(self.run_id, "images")]
            matches = [match for path in paths if (match := _PICTURE.fullmatch(path))]
            self._pictures = {(match[1].replace("~", "/"), int(match[2])) for match in matches}
        return self._pictures

    def _checkpoint_models(self) -> "list[LoggedModel]":
        """The logged models of this run that are checkpoints."""
        of_run, search = f"source_run_id = '{self.run_id}'", self.catalog.client.search_logged_models
        models = paged(lambda token: search([self.catalog.experiment_id], of_run, page_token=token))
        return [model for model in models if "step" in model.params]


def artifact_tags(artifact: Artifact) -> dict[str, str]:
    """The tags by which an artifact is found in MLflow."""
    return {
        "edt.kind": artifact.manifest.kind,
        "edt.fingerprint": artifact.fingerprint,
        "edt.uri": artifact.folder.uri,
        "edt.digest": artifact.manifest.digest,
        "edt.inputs": canonical_json(dict(artifact.manifest.inputs)),
    }


def _batches(metrics: "list[Metric]") -> "Iterable[list[Metric]]":
    return (metrics[start : start + _MAX_METRICS] for start in range(0, len(metrics), _MAX_METRICS))


def _decoded(picture: Picture) -> Any:
    """A PIL image in RGB."""
    from mlflow.exceptions import MlflowException
    from PIL import Image

    try:
        return Image.open(io.BytesIO(picture.png)).convert("RGB")
    except OSError as error:
        raise MlflowException.invalid_parameter_value(f"{picture.name} is not an image: {error}") from error

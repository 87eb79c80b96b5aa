"""The registered model as an `mlflow.pyfunc` model, logged from this file as code: nothing is pickled.

`mlflow.pyfunc.load_model("models:/NAME@champion").predict(numpy.array([3, 3, 7]))` gives uint8 images [N, S, S, 3].
"""

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from numpy.typing import NDArray


class PyfuncEDT(PythonModel):
    """Class labels to images. Parameters: num_inference_steps, cfg_scale, seed."""

    def load_context(self, context: PythonModelContext) -> None:
        from edt_core.pipeline import EDTPipeline

        self.pipeline = EDTPipeline.from_pretrained(context.artifacts["pipeline"], low_cpu_mem_usage=False)
        self.pipeline.set_progress_bar_config(disable=True)

    # MLflow reads type hints of `predict` as a schema and knows no arrays; the logged signature says what goes in.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Images, uint8 [N, S, S, 3], for class labels, an integer array [N]. Parameters of 0 are as evaluated.

        Raises MlflowException, which a server answers with status 400, for labels and parameters that do not fit.
        """
        from edt_core.errors import UserError

        labels = np.asarray(model_input).reshape(-1)
        given = {name: value for name, value in (params or {}).items() if value or name == "seed"}
        try:
            images = self.pipeline(labels, **given).images
        except UserError as error:  # for a server any other exception is an error of its own
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error
        pixels: NDArray[np.uint8] = np.stack(images)
        return pixels


mlflow.models.set_model(PyfuncEDT())

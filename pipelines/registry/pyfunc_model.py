"""The registered model as an `mlflow.pyfunc` model, logged from this file as code: nothing is pickled.

`mlflow.pyfunc.load_model("models:/NAME@champion").predict(numpy.array([3, 3, 7]))` returns uint8 images [N, S, S, 3].
"""

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from numpy.typing import NDArray


class _Prediction:
    """The methods of the model. In a subclass of PythonModel MLflow would warn that `predict` has no type hints.

    It has none because MLflow reads them as a schema, which has no arrays. The signature is logged instead.
    """

    def load_context(self, context: PythonModelContext) -> None:
        from edt_core.pipeline import EDTPipeline

        self.pipeline = EDTPipeline.from_pretrained(context.artifacts["pipeline"], low_cpu_mem_usage=False)
        self.pipeline.set_progress_bar_config(disable=True)

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Images, uint8 [N, S, S, 3], for class labels, an integer array [N]. A parameter of 0 means its default.

        The defaults are the settings of the model's evaluation. Raises MlflowException for invalid labels and
        parameters, which a server answers with status 400.
        """
        from edt_core.errors import UserError

        labels = np.asarray(model_input).reshape(-1)
        settings = {name: value for name, value in (params or {}).items() if value or name == "seed"}
        try:
            images = self.pipeline(labels, **settings).images
        except UserError as error:  # a server answers any other exception with status 500
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from error
        pixels: NDArray[np.uint8] = np.stack(images)
        return pixels


class PyfuncEDT(_Prediction, PythonModel):
    """Class labels to images. Parameters: num_inference_steps, cfg_scale, seed."""


mlflow.models.set_model(PyfuncEDT())

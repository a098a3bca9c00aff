"""The model that MLflow serves: one file, stored as text inside every version ("models from code").

MLflow runs this file when it loads a model; the last line is how the file names its model. The
package `teasr` beside it in the model's `code` folder is the one that the version was made with.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pandas
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

from teasr.errors import TeasrError, UsageError

VERSION_VARIABLE = "TEASR_SERVED_VERSION"
MAX_BYTES = 64 * 1024 * 1024
"""Of one encoded picture."""
MAX_PIXELS = 16_000_000
"""Of one picture before it is enlarged."""

_log = logging.getLogger(__name__)


class RestorationModel(PythonModel):
    """Restores pictures; what goes in and out is in `teasr.registry.signature`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model from its description, beside which its weights lie."""
        from teasr.backbones.folder import DESCRIPTION_FILE, load_model

        weights = Path(context.artifacts[DESCRIPTION_FILE]).parent
        self.model = load_model(weights)
        self.version = os.environ.get(VERSION_VARIABLE) or _registered_version(weights)
        # The scoring server calls from many threads. One picture at a time keeps memory bounded,
        # and the network uses every core anyway.
        self.turn = threading.Lock()

    def predict(
        self,
        context: PythonModelContext,
        model_input: pandas.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Restore every picture of `model_input`, a table with one column `image`.

        Args:
            params: `steps`, `seed`, `tile`; see `RestorationSettings`.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE (HTTP 400) with one sentence for a bad request,
                INTERNAL_ERROR (HTTP 500) for a fault of ours, whose traceback goes to the log only.
        """
        from teasr.restoration import RestorationSettings

        try:
            settings = RestorationSettings.from_mapping(params or {}, "params")
            return [self._restore(text, settings) for text in model_input["image"]]
        except TeasrError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None
        except Exception:
            _log.exception("a picture could not be restored")
            message = "The server failed; its log has the reason."
            raise MlflowException(message, error_code=INTERNAL_ERROR) from None

    def _restore(self, text: Any, settings: Any) -> dict[str, Any]:
        from teasr.images import decode, header
        from teasr.restoration import restore_picture

        picture = decode(_bytes_of(text), max_pixels=MAX_PIXELS)
        with self.turn:
            png = restore_picture(
                self.model.network, picture, settings, format="png", codec=self.model.codec
            )
        width, height, _ = header(png)
        return {
            "image": base64.b64encode(png).decode("ascii"),
            "width": width,
            "height": height,
            "version": self.version,
        }


def _bytes_of(text: Any) -> bytes:
    if not isinstance(text, str):
        raise UsageError("'image' must be a picture in base64.")
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise UsageError(f"The picture is larger than {MAX_BYTES // 1024 // 1024} MiB.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("'image' is not valid base64.") from None


def _registered_version(weights: Path) -> str:
    """`name version N` from the note that MLflow puts beside a version it downloads by name."""
    for folder in weights.parents[:2]:
        note = folder / "registered_model_meta"
        if note.is_file():
            noted = yaml.safe_load(note.read_text())
            return f"{noted['model_name']} version {noted['model_version']}"
    return "unregistered"


set_model(RestorationModel())

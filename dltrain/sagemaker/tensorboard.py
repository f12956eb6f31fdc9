"""Where a SageMaker training job wants TensorBoard's events: a local folder, which SageMaker itself copies to S3.

    folder = tensorboard_folder()  # "/opt/ml/output/tensorboard", or "" where the job asks for none

Reference: https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_TensorBoardOutputConfig.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from dltrain.errors import UserError
from dltrain.sagemaker.folders import Folders

CONFIG = "tensorboardoutputconfig.json"
FILE = "TENSORBOARD_CONFIG_FILE_PATH"
"""Variable that names the file itself."""

LOCAL_PATH = "/opt/ml/output/tensorboard"
"""Where a job has its events that does not say."""


def tensorboard_folder(variables: Mapping[str, str] | None = None) -> str:
    """The ``LocalPath`` of ``tensorboardoutputconfig.json``; empty where there is no such file.

    The file lies in ``SM_INPUT_CONFIG_DIR`` (or ``/opt/ml/input/config``, ``/opt/ml`` moved by ``SAGEMAKER_BASE_DIR``),
    unless ``TENSORBOARD_CONFIG_FILE_PATH`` names it. Raises :class:`UserError` where it is no JSON object.
    """
    variables = os.environ if variables is None else variables
    file = Path(variables.get(FILE) or Folders.read(variables).config / CONFIG)
    if not file.is_file():
        return ""
    try:
        return str(json.loads(file.read_text()).get("LocalPath") or LOCAL_PATH)
    except (ValueError, AttributeError):
        raise UserError(f"{file} is no JSON object with a LocalPath; it says where TensorBoard's events go") from None

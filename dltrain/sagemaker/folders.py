"""The folders of a training job's container: below ``/opt/ml``, unless they were moved.

    folders = Folders.read()
    folders.config / "resourceconfig.json"

Reference: https://docs.aws.amazon.com/sagemaker/latest/dg/model-train-storage.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dltrain.errors import UserError

BASE = "/opt/ml"


@dataclass(frozen=True)
class Folders:
    """What comes in and what is taken out, by SageMaker's own names."""

    base: Path
    config: Path
    """Descriptions of the job, ``input/config``."""
    data: Path
    """Channels, ``input/data``."""
    model: Path
    """Becomes model.tar.gz at the end, of all hosts together."""
    output: Path
    """Holds ``failure``, of which the first 1,024 characters are the job's failure reason."""
    output_data: Path
    """Becomes output.tar.gz at the end, of all hosts together."""
    intermediate: Path

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None) -> Folders:
        """From ``SM_INPUT_CONFIG_DIR``, ``SM_MODEL_DIR`` and the like, or else below ``SAGEMAKER_BASE_DIR``."""
        said = os.environ if variables is None else variables
        base = Path(said.get("SAGEMAKER_BASE_DIR") or BASE)

        def folder(name: str, otherwise: Path) -> Path:
            return Path(said.get(name) or otherwise)

        given, output = folder("SM_INPUT_DIR", base / "input"), folder("SM_OUTPUT_DIR", base / "output")
        return cls(
            base,
            folder("SM_INPUT_CONFIG_DIR", given / "config"),
            folder("SM_INPUT_DATA_DIR", given / "data"),
            folder("SM_MODEL_DIR", base / "model"),
            output,
            folder("SM_OUTPUT_DATA_DIR", output / "data"),
            folder("SM_OUTPUT_INTERMEDIATE_DIR", output / "intermediate"),
        )

    def described(self, name: str) -> dict[str, Any]:
        """The JSON object in a file of ``config``; empty where there is none. Raises :class:`UserError` where it is
        none."""
        file = self.config / name
        return object_of(file.read_text(), str(file)) if file.is_file() else {}


def object_of(text: str, where: str) -> dict[str, Any]:
    """A JSON object; nothing is an empty one. Raises :class:`UserError` naming ``where`` it stands."""
    try:
        tree = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error}); SageMaker writes an object there") from None
    if not isinstance(tree, dict):
        raise UserError(f"{where} is {text[:40]!r}; SageMaker writes a JSON object there")
    return tree

"""How remote objects are reached: one section of the config, known to every process of a job.

Endpoint, region and credentials come from AWS's own chain of environment, profiles and roles; what that chain cannot
say is said here. Worker processes inherit the settings through one variable, ``DLTRAIN_STORAGE``.

    configure(Storage(anonymous=True))
"""

from __future__ import annotations

import os
from functools import lru_cache

from pydantic import ValidationError

from dltrain.config.tree import Storage
from dltrain.errors import UserError

VARIABLE = "DLTRAIN_STORAGE"


def configure(settings: Storage) -> None:
    """Use these settings in this process and in those it starts."""
    os.environ[VARIABLE] = settings.model_dump_json()


def settings() -> Storage:
    """The settings of this process."""
    return _parsed(os.environ.get(VARIABLE, ""))


@lru_cache(maxsize=4)
def _parsed(text: str) -> Storage:
    if not text:
        return Storage()
    try:
        return Storage.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{VARIABLE} is not a storage section in JSON: {error.errors()[0]['msg']}") from None

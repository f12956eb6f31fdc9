"""What SageMaker takes in a request: every length, number, pattern and name, as AWS's own description of its API says.

    check(request)  # raises UserError for the first thing that SageMaker would refuse

boto3 itself checks types and names alone: a hyperparameter of 3,000 characters is refused by the service.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from dltrain.errors import UserError, nearest


def check(request: Mapping[str, Any], operation: str = "CreateTrainingJob") -> None:
    """Raises :class:`UserError` that names the place, what stands there, and what there may be."""
    for complaint in complaints(_shape(operation), request, ""):
        raise UserError(f"SageMaker would refuse this job: {complaint}")


def check_value(place: str, value: Any, named: str, operation: str = "CreateTrainingJob") -> None:
    """The same of one value at a place in the request ("ResourceConfig.InstanceType"), by what the user calls it."""
    shape = _shape(operation)
    for name in place.split("."):
        shape = shape.members[name]
    for complaint in complaints(shape, value, named):
        raise UserError(f"SageMaker would refuse this job: {complaint}")


@cache
def _shape(operation: str) -> Any:
    import botocore.session  # slow to import

    model = botocore.session.get_session().get_service_model("sagemaker")
    return model.operation_model(operation).input_shape


def complaints(shape: Any, value: Any, place: str) -> Iterator[str]:
    """Sentences about a value and what is in it, by botocore's shape of it."""
    if shape.type_name == "structure":
        yield from _of_structure(shape, value, place)
    elif shape.type_name == "map":
        yield from _of_size(shape, len(value), place, "entries")
        for key, each in value.items():
            yield from complaints(shape.key, key, f"the name {key[:40]!r} in {place}")
            yield from complaints(shape.value, each, f"{place}.{key}")
    elif shape.type_name == "list":
        yield from _of_size(shape, len(value), place, "entries")
        for number, each in enumerate(value):
            yield from complaints(shape.member, each, f"{place}[{number}]")
    elif shape.type_name == "string":
        yield from _of_text(shape, value, place)
    elif shape.type_name in ("integer", "long") and not isinstance(value, bool) and isinstance(value, int):
        yield from _of_number(shape, value, place)
    elif not isinstance(value, _TYPES.get(shape.type_name, object)):
        yield f"{place} is {value!r}, which is no {shape.type_name}"


_TYPES: dict[str, type | tuple[type, ...]] = {"integer": int, "long": int, "boolean": bool, "float": (int, float)}


def _of_structure(shape: Any, value: Any, place: str) -> Iterator[str]:
    for name in shape.required_members:
        if name not in value:
            yield f"{place}.{name} is missing".removeprefix(".")
    for name, each in value.items():
        inside = f"{place}.{name}".removeprefix(".")
        if name not in shape.members:
            yield f"there is no {inside}; {nearest(name, shape.members)}"
        else:
            yield from complaints(shape.members[name], each, inside)


def _of_text(shape: Any, value: Any, place: str) -> Iterator[str]:
    if not isinstance(value, str):
        yield f"{place} is {value!r}, which is no text"
        return
    yield from _of_size(shape, len(value), place, "characters")
    if shape.enum and value not in shape.enum:
        yield f"{place} is {value!r}; {nearest(value, shape.enum)}"
    pattern = shape.metadata.get("pattern", "")
    if pattern and r"\p{" not in pattern and not re.fullmatch(pattern, value):  # which Python does not know
        yield f"{place} is {value[:80]!r}, which does not fit {pattern}"


def _of_size(shape: Any, size: int, place: str, of: str) -> Iterator[str]:
    most, least = shape.metadata.get("max"), shape.metadata.get("min")
    if most is not None and size > most:
        yield f"{place} has {size:,} {of}, and {most:,} are the most"
    if least is not None and size < least:
        yield f"{place} has {size:,} {of}, and {least:,} are the least"


def _of_number(shape: Any, value: int, place: str) -> Iterator[str]:
    most, least = shape.metadata.get("max"), shape.metadata.get("min")
    if most is not None and value > most:
        yield f"{place} is {value:,}, and {most:,} is the most"
    if least is not None and value < least:
        yield f"{place} is {value:,}, and {least:,} is the least"

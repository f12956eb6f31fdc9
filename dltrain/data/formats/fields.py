"""From the values of a row or a record to the fields of a sample.

A field's extension says how its bytes are to be read, so each value gets the one that fits: images by their first
bytes, whole-numbered labels ``cls``, texts ``txt``, other numbers ``json``, arrays ``npy``. Where a column is called
after what it is (``image``, ``label``, ``text``) the extension alone is the field's name; else the column's name comes
before it.

    assert as_fields({"image": jpeg, "label": 3, "width": 640}) == {"jpg": jpeg, "cls": b"3", "width.json": b"640"}
    assert as_fields({"image": jpeg, "label": 3}, {"jpg": "image"}) == {"jpg": jpeg}
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dltrain.errors import UserError, nearest

_LABELS = {"label", "labels", "class", "class_id", "category", "target", "fine_label", "image/class/label", "cls"}
_PLAIN = {"image", "img", "image/encoded", "text", "values", "features", "jpg", "jpeg", "png", "txt", "npy", "json"}
_OTHER = re.compile(r"[^a-z0-9_]+")


def as_fields(values: Mapping[str, Any], chosen: Mapping[str, str] | None = None) -> dict[str, bytes]:
    """The fields of one sample; values that are None are left out.

    ``chosen`` names the value of each field; without it every value becomes a field. Raises :class:`UserError`.
    """
    if chosen is None:
        named = [(_field(name, value), name, value) for name, value in values.items() if value is not None]
    else:
        named = [(field, name, _find(values, name)) for field, name in chosen.items()]
    fields = {field: encode(value, field.rpartition(".")[2], name) for field, name, value in named if value is not None}
    if chosen is None and len(fields) < len(named):
        raise UserError(
            f"two of the columns {', '.join(name for _, name, _ in named)} would be one field; "
            "name the columns that become fields, for example --fields jpg=image,cls=label"
        )
    return fields


def encode(value: Any, extension: str, name: str) -> bytes:
    """A value as bytes of that extension. Raises :class:`UserError` naming the column where it cannot be."""
    value = _single(value)
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    if extension == "cls" and _is_integral(value):
        return b"%d" % int(np.asarray(value).reshape(()))
    if extension == "npy" and np.asarray(value).dtype.kind in "biuf":
        return npy(np.asarray(value))
    if extension == "json" and np.asarray(value).dtype.kind in "biuf":
        return json.dumps(np.asarray(value).tolist()).encode()
    raise UserError(
        f"column {name!r} holds {value!r:.40} ({type(value).__name__}), which makes no .{extension}; "
        "name the columns that become fields, for example --fields jpg=image,cls=label"
    )


def npy(values: np.ndarray[Any, Any]) -> bytes:
    """An array as a ``.npy`` file without pickles."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values, order="C"), allow_pickle=False)
    return buffer.getvalue()


def image_kind(data: bytes) -> str:
    """The extension of an image by its first bytes, '' for what is none."""
    for kind, magic in (("jpg", b"\xff\xd8\xff"), ("png", b"\x89PNG\r\n\x1a\n"), ("bmp", b"BM"), ("gif", b"GIF8")):
        if data.startswith(magic):
            return kind
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def key_of(value: Any) -> str:
    """A value as a sample's key; dots would end it, so they become underscores."""
    text = value.decode() if isinstance(value, bytes) else str(value)
    folder, slash, base = text.strip("/").rpartition("/")
    return f"{folder}{slash}{base.replace('.', '_')}"


def column_name(name: str) -> str:
    """A column's name as part of a field's: lower case, without dots and slashes."""
    return _OTHER.sub("_", name.lower()).strip("_") or "column"


def _field(name: str, value: Any) -> str:
    value = _single(value)
    if name.lower() in _LABELS and np.asarray(value).dtype.kind in "biu" and np.size(value) == 1:
        return "cls"
    if isinstance(value, bytes):
        kind = image_kind(value) or "bin"
    elif isinstance(value, str):
        kind = "txt"
    else:
        kind = "npy" if isinstance(value, np.ndarray) else "json"
    return kind if name.lower() in _PLAIN else f"{column_name(name)}.{kind}"


def _single(value: Any) -> Any:
    """What is inside of a list of one piece of bytes, and of an image as Hugging Face stores it."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], bytes):
        return value[0]
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        if value["bytes"] is None:
            raise UserError(f"the image {value['path']!r} is a path, not stored in the file; embed the images first")
        return value["bytes"]
    return value


def _is_integral(value: Any) -> bool:
    array = np.asarray(value)
    return array.size == 1 and array.dtype.kind in "biuf" and float(array.reshape(())).is_integer()


def _find(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise UserError(f"there is no column {name!r} to make a field of; {nearest(name, values)}")
    return values[name]

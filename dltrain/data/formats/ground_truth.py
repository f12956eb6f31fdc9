"""SageMaker Ground Truth's augmented manifests: JSON lines that name an image (or hold a text) and its labels.

    {"source-ref": "s3://bucket/1.jpg", "species": 3, "species-metadata": {"class-name": "tulip", "type": "..."}}

Classes become ``cls``, boxes ``boxes.npy`` [n, 5] (class, left, top, width, height in pixels), masks ``mask.png``,
several classes at once ``classes.npy``. Reference: https://docs.aws.amazon.com/sagemaker/latest/dg/sms-data-output.html

    dataset = GroundTruthDataset("s3://bucket/labels/output.manifest")
"""

from __future__ import annotations

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dltrain import storage
from dltrain.data.formats.compression import open_stream
from dltrain.data.formats.fields import image_kind, npy
from dltrain.data.formats.source import inside, stem
from dltrain.data.sample import Sample
from dltrain.errors import UserError

SAMPLES_PER_SHARD = 256
"""Lines that the order of data keeps together."""

_READS = 16
_SIZES_LOOKED_AT = 16
_BOX = ("class_id", "left", "top", "width", "height")

Line = dict[str, Any]


class GroundTruthDataset:
    """The lines of a manifest, each a sample; ``label`` names the attribute that counts where there are several."""

    def __init__(self, url: str, label: str = "") -> None:
        self._url, self._stem = url, stem(inside(url, url))
        self._lines = list(_read_lines(url))
        if not self._lines:
            raise UserError(f"{url} is empty: it has no line of JSON")
        self._attribute = self._choose(label)
        content = json.dumps([self._lines, self._attribute], sort_keys=True)
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        full, rest = divmod(len(self._lines), SAMPLES_PER_SHARD)
        return (SAMPLES_PER_SHARD,) * full + ((rest,) if rest else ())

    @property
    def facts(self) -> dict[str, Any]:
        """Names of the classes by number, where the lines tell all of them."""
        names: dict[int, str] = {}
        for line in self._lines:
            names.update(_class_names(line, self._attribute))
        return {"classes": [names[number] for number in sorted(names)]} if set(names) == set(range(len(names))) else {}

    def read(self, shards: NDArray[np.int64], indices: NDArray[np.int64]) -> list[Sample]:
        with ThreadPoolExecutor(_READS) as pool:
            return list(pool.map(self._read, (shards * SAMPLES_PER_SHARD + indices).tolist()))

    def bytes_per_sample(self) -> int:
        """The mean size of a few images."""
        places = np.linspace(0, len(self._lines) - 1, min(len(self._lines), _SIZES_LOOKED_AT)).astype(int)
        urls = [self._lines[place].get("source-ref") for place in places.tolist()]
        sizes = [storage.size(url) if url else len(self._lines[0].get("source", "")) for url in urls]
        return sum(sizes) // len(sizes)

    def _read(self, place: int) -> Sample:
        line, where = self._lines[place], f"line {place + 1} of {self._url}"
        try:
            fields = {**_content(line), **self._label(line)}
        except (UserError, KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{where} cannot be read: {reason}") from None
        return Sample(f"{self._stem}/{place:08d}", fields, self._url)

    def _label(self, line: Line) -> dict[str, bytes]:
        name = self._attribute
        if not name:
            return {}
        if f"{name}-ref" in line:
            return {"mask.png": bytes(storage.read(line[f"{name}-ref"]))}
        value = line[name]
        if isinstance(value, dict):
            boxes = [[box[part] for part in _BOX] for box in value["annotations"]]
            return {"boxes.npy": npy(np.array(boxes, dtype=np.float32).reshape(-1, len(_BOX)))}
        if isinstance(value, list):
            return {"classes.npy": npy(np.array(value, dtype=np.int64))}
        return {"cls": b"%d" % int(value)}

    def _choose(self, label: str) -> str:
        """The attribute that holds the label: the one with metadata beside it."""
        found = sorted(
            {key.removesuffix("-metadata") for line in self._lines for key in line if key.endswith("-metadata")}
        )
        found = sorted({name.removesuffix("-ref") for name in found})
        if label and label not in found:
            raise UserError(f"{self._url} has no label {label!r}; it has: {', '.join(found) or 'none'}")
        if not label and len(found) > 1:
            raise UserError(f"{self._url} has the labels {', '.join(found)}; name the one to use with --label")
        return label or (found[0] if found else "")


def _read_lines(url: str) -> Any:
    with open_stream(url) as file:
        for number, text in enumerate(io.TextIOWrapper(file, "utf-8-sig"), start=1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                raise UserError(f"line {number} of {url} is no JSON: {error}") from None
            if not isinstance(line, dict) or not {"source-ref", "source"} & set(line):
                raise UserError(f"line {number} of {url} has neither source-ref nor source; is it a manifest?")
            yield line


def _content(line: Line) -> dict[str, bytes]:
    if "source-ref" not in line:
        return {"txt": str(line["source"]).encode()}
    data = bytes(storage.read(line["source-ref"]))
    return {image_kind(data) or line["source-ref"].rpartition(".")[2].lower(): data}


def _class_names(line: Line, attribute: str) -> dict[int, str]:
    metadata = line.get(f"{attribute}-metadata", {})
    if "class-name" in metadata and isinstance(line.get(attribute), int):
        return {int(line[attribute]): metadata["class-name"]}
    return {int(number): name for number, name in metadata.get("class-map", {}).items()}

"""Opening: whatever lies at a URL, the same loader trains from it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dltrain import storage
from dltrain.data.building.indexing import index_shards
from dltrain.data.dataset import Cache, open_dataset
from dltrain.data.decode import decode_field, decode_record
from dltrain.data.formats.recordio import encode_record, write_records
from dltrain.data.loader import Loader
from dltrain.data.order import Order
from dltrain.data.sample import BadSample, Sample
from dltrain.errors import UserError
from dltrain.testing.s3 import S3Server

CLASSES = ("cat", "dog")


def photo(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder: Path) -> None:
    for number in range(20):
        file = folder / CLASSES[number % 2] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(photo(number))


def write_parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    table = pa.table({"png": [photo(number) for number in range(20)], "cls": [number % 2 for number in range(20)]})
    pq.write_table(table, folder / "part.parquet", row_group_size=6)


def write_ground_truth(folder: Path) -> None:
    write_folder(folder / "images")
    lines = [
        {
            "source-ref": str(folder / "images" / CLASSES[number % 2] / f"{number:02d}.png"),
            "animal": number % 2,
            "animal-metadata": {"class-name": CLASSES[number % 2], "type": "groundtruth/image-classification"},
        }
        for number in range(20)
    ]
    (folder / "labels.manifest").write_text("".join(json.dumps(line) + "\n" for line in lines))


def image_and_class(sample: Sample, random: np.random.Generator | None) -> dict[str, np.ndarray[Any, Any]]:
    return {"png": decode_field(sample, "png"), "cls": decode_field(sample, "cls")}


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_folder, ""), (write_parquet, ""), (write_ground_truth, "labels.manifest")],
    ids=["folder", "parquet", "ground truth"],
)
def test_what_has_no_shards_is_trained_from_as_it_lies(tmp_path: Path, write: Any, name: str) -> None:
    write(tmp_path / "set")
    dataset = open_dataset(str(tmp_path / "set" / name) if name else str(tmp_path / "set"))
    order = Order(dataset.shard_sizes, lanes=2)
    loader = Loader(dataset, order, image_and_class, global_batch_size=7, tail="pad", epochs=1)
    found = {
        (int(image[0, 0, 0]), int(label))
        for batch in loader
        for image, label, weight in zip(batch.fields["png"], batch.fields["cls"], batch.weight, strict=True)
        if weight
    }
    assert found == {(number, number % 2) for number in range(20)}


def test_records_of_sagemaker_are_read_where_they_lie_on_s3(s3: S3Server, tmp_path: Path) -> None:
    url = f"s3://data{tmp_path}"
    file = io.BytesIO()
    write_records(file, (encode_record({"values": np.arange(4, dtype=np.float32) + n}) for n in range(9)))
    storage.write(storage.join(url, "part.rec"), file.getvalue())
    index_shards(url)
    dataset = open_dataset(url, cache=Cache(str(tmp_path / "cache")))
    samples = dataset.read(np.zeros(3, np.int64), np.array([8, 0, 4]))
    assert [decode_record(sample)["values"].tolist()[0] for sample in samples] == [8.0, 0.0, 4.0]
    with pytest.raises(BadSample, match="cannot decode field 'record'"):
        decode_record(Sample("k", {"record": b"\xff\xff\xff"}, url))


def test_nothing_at_a_url_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no data set at .*: .*manifest\.json does not exist"):
        open_dataset(str(tmp_path))

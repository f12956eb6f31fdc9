"""What is converted: compressed tars, Parquet, folders of images, CSV, Ground Truth; and what is said of bad input."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dltrain import storage
from dltrain.data.formats.folder import FolderDataset
from dltrain.data.formats.opening import Options, guess, open_source
from dltrain.data.formats.parquet import ParquetDataset
from dltrain.data.formats.source import is_object
from dltrain.data.order import Order
from dltrain.errors import UserError
from dltrain.testing.s3 import S3Server

Samples = dict[str, dict[str, bytes]]


def samples(url: str, kind: str = "", **options: Any) -> Samples:
    """All samples of a source, also of its copy as another process gets it."""
    source = open_source(url, kind, Options(**options))
    pieces = len(source.sizes())
    found = list(source.read(0, pieces))
    again = pickle.loads(pickle.dumps(source))
    assert list(again.read(0, pieces, skip=1)) == found[1:]
    assert again.identity == source.identity
    assert len(dict(found)) == len(found)
    return dict(found)


def npy(data: bytes) -> Any:
    return np.load(io.BytesIO(data), allow_pickle=False)


def picture(shade: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


# tars


def tar_bytes() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("a.txt", "a.cls", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(name[:3].encode()))
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSED = {
    ".tar": bytes,
    ".tar.gz": gzip.compress,
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
    ".tar.zst": zstd,
}


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_tars_are_read_through_compressed_or_not(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x{suffix}"
    file.write_bytes(COMPRESSED[suffix](tar_bytes()))
    assert samples(str(tmp_path)) == {"a": {"txt": b"a.t", "cls": b"a.c"}, "b": {"txt": b"b.t"}}
    with pytest.raises(UserError, match=r"sample 'b' of .*: there is no column 'cls'"):
        samples(str(file), fields={"cls": "cls"})


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESSED if suffix != ".tar"])
def test_a_compressed_tar_cut_short_is_told(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x{suffix}"
    file.write_bytes(COMPRESSED[suffix](tar_bytes() + np.random.default_rng(0).bytes(100_000))[:-50_000])
    with pytest.raises(UserError, match=r"x\.tar\..* (cannot be read on from|is truncated|goes on behind its end)"):
        samples(str(file))


# Parquet


def write_parquet(path: Path, rows: int = 10, **options: Any) -> None:
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    table = pyarrow.table(
        {
            "image": [{"bytes": picture(row), "path": f"{row}.png"} for row in range(rows)],
            "label": [row % 2 for row in range(rows)],
            "caption": [None if row == 3 else f"number {row}" for row in range(rows)],
            "curve": [[row + 0.5] * (row % 4) for row in range(rows)],
            "width": pyarrow.array([row * 10 for row in range(rows)], pyarrow.int32()),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path, **options)


def test_parquet_columns_become_fields(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", row_group_size=4)
    write_parquet(tmp_path / "b.parquet", rows=3)
    found = samples(str(tmp_path))
    assert list(found)[9:11] == ["a/00000009", "b/00000000"]
    row = found["a/00000006"]
    assert (row["png"], row["cls"], row["caption.txt"], row["width.json"]) == (picture(6), b"0", b"number 6", b"60")
    assert npy(row["curve.npy"]).tolist() == [6.5, 6.5]
    assert "caption.txt" not in found["a/00000003"]
    assert open_source(str(tmp_path)).facts == {"classes": ["cat", "dog"]}


def test_parquet_columns_are_chosen_and_name_the_key(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    found = samples(str(tmp_path / "a.parquet"), fields={"cls": "label", "npy": "width"}, key="width")
    assert list(found) == [str(row * 10) for row in range(10)]
    assert (found["70"]["cls"], npy(found["70"]["npy"]).tolist()) == (b"1", 70)


def test_a_parquet_data_set_is_read_by_row_group_and_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", row_group_size=4)
    dataset = ParquetDataset(str(tmp_path), {"cls": "label", "txt": "caption"}, memory=0)
    assert dataset.shard_sizes == (4, 4, 2)
    shards, indices = Order(dataset.shard_sizes, seed=1).locate(np.arange(10))
    keys = [sample.key for sample in dataset.read(shards, indices)]
    assert keys == [f"a/{4 * shard + index:08d}" for shard, index in zip(shards, indices, strict=True)]
    assert len(dataset._tables) == 1  # whatever the memory, the row group at hand


def test_the_fingerprint_of_parquet_follows_the_data(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    before = ParquetDataset(str(tmp_path)).fingerprint
    assert ParquetDataset(str(tmp_path)).fingerprint == before
    assert ParquetDataset(str(tmp_path), {"cls": "label"}).fingerprint != before
    write_parquet(tmp_path / "a.parquet", row_group_size=5)
    assert ParquetDataset(str(tmp_path)).fingerprint != before


def test_parquet_is_read_from_s3(s3: S3Server, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", row_group_size=4)
    storage.upload(tmp_path / "a.parquet", "s3://data/parquet/a.parquet")
    assert samples("s3://data/parquet") == samples(str(tmp_path))
    names = ("s3://data/parquet/a.parquet", "s3://data/parquet", "s3://data/", "s3://data")
    assert [is_object(name) for name in names] == [True, False, False, False]


def test_damaged_parquet_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    write_parquet(file, write_page_checksum=True)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=r"a\.parquet is no Parquet file, or a truncated one"):
        samples(str(file))
    damaged = bytearray(whole)
    damaged[200] ^= 255
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"row group 0 of .*a\.parquet cannot be read"):
        samples(str(file))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fields": {"jpg": "imaeg"}}, r"has no column 'imaeg'; did you mean 'image'\?"),
        ({"key": "id"}, "has no column 'id'"),
        ({"fields": {"png": "width"}}, r"row 0 of .*: column 'width' holds 0 \(int\), which makes no \.png"),
        ({"fields": {"x": "when"}}, r"column 'when' of .* is of type timestamp.*, which makes no field"),
        ({"label": "label"}, "--label does not go with --from parquet"),
    ],
)
def test_what_parquet_cannot_give_is_told(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    times = pyarrow.array([0, 1], pyarrow.timestamp("s"))
    table = {"width": [0, 1], "image": [b"x", b"y"], "when": times}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=reason):
        samples(str(tmp_path), **options)


# folders of images


def write_folder(root: Path) -> Path:
    for label in ("tulip", "rose"):
        (root / label / "more").mkdir(parents=True)
        for number in range(6):
            (root / label / f"{number}.JPEG").write_bytes(picture(number, "JPEG"))
    (root / "tulip" / "more" / "x.1.png").write_bytes(picture(9))
    (root / "tulip" / "notes.txt").write_text("no image")
    (root / "tulip" / ".hidden.png").write_bytes(picture(9))
    return root


def test_folders_are_classes(tmp_path: Path) -> None:
    found = samples(str(write_folder(tmp_path)) + "/")
    assert len(found) == 13
    assert found["rose/4"] == {"jpg": picture(4, "JPEG"), "cls": b"0"}
    assert found["tulip/more/x_1"] == {"png": picture(9), "cls": b"1"}
    assert open_source(str(tmp_path)).facts == {"classes": ["rose", "tulip"]}


def test_neighbours_in_a_folder_data_set_are_of_all_classes(tmp_path: Path) -> None:
    for label in range(2):
        (tmp_path / str(label)).mkdir()
        for number in range(400):
            (tmp_path / str(label) / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    dataset = FolderDataset(str(tmp_path))
    assert dataset.shard_sizes == (256, 256, 256, 32)
    labels = [int(sample.fields["cls"]) for sample in dataset.read(np.zeros(256, np.int64), np.arange(256))]
    assert 90 < sum(labels) < 166  # half of 256, within five standard deviations (8)


def test_folders_that_are_no_classes_are_told(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "rose" / "4.png").write_bytes(picture(4))
    with pytest.raises(UserError, match=r"holds rose/4\.(png|JPEG) and rose/4\.(png|JPEG), which would be one sample"):
        FolderDataset(str(tmp_path))
    (tmp_path / "flat.png").write_bytes(picture(4))
    with pytest.raises(UserError, match=r"holds the image flat\.png outside of any class"):
        FolderDataset(str(tmp_path))


def test_folders_are_read_from_s3(s3: S3Server, tmp_path: Path) -> None:
    for file in sorted(write_folder(tmp_path).rglob("*.JPEG")):
        storage.upload(file, f"s3://data/folder/{file.relative_to(tmp_path)}")
    found = samples("s3://data/folder")
    assert {key: fields["cls"] for key, fields in found.items()} == {
        f"{label}/{number}": cls for label, cls in (("rose", b"0"), ("tulip", b"1")) for number in range(6)
    }


# CSV


def test_rows_become_vectors_and_classes(tmp_path: Path) -> None:
    (tmp_path / "iris.csv").write_text('id,width,length,species\nf.1,0.5,2,setosa\nf.2,,3.5,"vir,ginica"\n')
    found = samples(str(tmp_path), key="id", label="species")
    assert list(found) == ["f_1", "f_2"]
    assert [row["cls"] for row in found.values()] == [b"0", b"1"]
    assert npy(found["f_1"]["npy"]).tolist() == [0.5, 2.0]
    assert np.isnan(npy(found["f_2"]["npy"])[0])
    assert open_source(str(tmp_path), options=Options(label="species")).facts == {"classes": ["setosa", "vir,ginica"]}


def test_columns_of_rows_are_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress("\ufeffname;grade\nänne;3\n".encode()))
    found = samples(str(tmp_path), fields={"txt": "name", "cls": "grade"}, delimiter=";")
    assert found == {"a/00000000": {"txt": "änne".encode(), "cls": b"3"}}


def test_rows_of_an_id_are_one_series(tmp_path: Path) -> None:
    rows = [f"{hour},{house},{hour + 10 * house},{-hour}" for hour in range(24) for house in range(3)]
    (tmp_path / "load.csv").write_text("\n".join(["hour,house,load,heat", *rows]))
    options = {"series": "house", "time": "hour", "season": 6}
    found = samples(str(tmp_path), **options)
    assert list(found) == ["0", "1", "2"]
    assert npy(found["2"]["npy"]).tolist() == [[hour + 20.0, -hour] for hour in range(24)]
    assert npy(found["2"]["npy"]).dtype == np.float32
    facts = open_source(str(tmp_path), options=Options(**options)).facts
    assert (facts["season"], facts["channels"]) == (6, ["load", "heat"])
    # hours 0 to 23: mean 11.5; six steps later every value has moved by six
    assert facts["series"]["0"]["mean"] == [11.5, -11.5]
    assert facts["series"]["0"]["seasonal_error"] == [6.0, 6.0]


def test_a_file_is_one_series(tmp_path: Path) -> None:
    for name in ("north", "south"):
        (tmp_path / f"{name}.csv").write_text("value\n" + "\n".join(map(str, range(5))))
    found = samples(str(tmp_path), series_per_file=True)
    assert {key: npy(fields["npy"]).shape for key, fields in found.items()} == {"north": (5, 1), "south": (5, 1)}
    assert open_source(str(tmp_path), options=Options(series_per_file=True)).facts["series"]["north"]["mean"] == 2.0


def test_the_channels_of_a_series_are_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("load\tplace\theat\n1\tnorth\t2\n3\tnorth\t4\n")
    found = samples(str(tmp_path), series_per_file=True, fields={"heat": "heat"})
    assert npy(found["a"]["npy"]).tolist() == [[2.0], [4.0]]


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        ("a,b\n1,x\n", {}, r"line 2 of .*t\.csv has 'x' in column 'b', which is no number"),
        ("a,b\n1\n", {}, "line 2 of .* has another number of cells"),
        ("a,b\n1,2,3\n", {}, "line 2 of .* has another number of cells"),
        ("a,b\n1,2\n", {"label": "c"}, "has no column 'c'; there are: a, b"),
        ("t,v\n2,0\n1,0\n", {"series_per_file": True, "time": "t"}, "line 3 of .* has t '1' after '2'; sort the rows"),
        ("a\n1\n", {"time": "a"}, "--time and --season are for series"),
        ("a\n1\n", {"series": "a", "label": "a"}, "are for rows that are samples"),
        ("a,b\n1,2\n", {"series": "a", "fields": {"c": "c"}}, "has no column 'c'; there are: a, b"),
        ("a\n1\n", {"series": "a", "season": 0}, "--season is 0; give 1 or more steps"),
        ("a\n1\n", {"delimiter": ", "}, "--delimiter is ', '; give one character"),
    ],
)
def test_what_a_csv_cannot_give_is_told(tmp_path: Path, text: str, options: dict[str, Any], reason: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=reason):
        samples(str(tmp_path), **options)


def test_what_is_no_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(UserError, match=r"t\.csv is no CSV: 'utf-8' codec"):
        samples(str(tmp_path))


# Ground Truth


def write_manifest(root: Path, *lines: dict[str, Any]) -> str:
    file = root / "output.manifest"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return str(file)


def test_ground_truths_classes_and_images(tmp_path: Path) -> None:
    lines = []
    for number, name in ((0, "cat"), (1, "dog"), (1, "dog")):
        (tmp_path / f"{len(lines)}.jpg").write_bytes(picture(number, "JPEG"))
        metadata = {"class-name": name, "type": "groundtruth/image-classification", "confidence": 0.9}
        lines.append({"source-ref": str(tmp_path / f"{len(lines)}.jpg"), "pet": number, "pet-metadata": metadata})
    url = write_manifest(tmp_path, *lines)
    found = samples(url)
    assert found["output/00000002"] == {"jpg": picture(1, "JPEG"), "cls": b"1"}
    assert open_source(url).facts == {"classes": ["cat", "dog"]}


def test_ground_truths_boxes_masks_and_texts(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture(1))
    image = {"source-ref": str(tmp_path / "x.png")}
    box = {"class_id": 2, "left": 10, "top": 20, "width": 30, "height": 40}
    boxes = {**image, "b": {"annotations": [box], "image_size": []}, "b-metadata": {"class-map": {"2": "dog"}}}
    masks = {**image, "m-ref": str(tmp_path / "x.png"), "m-ref-metadata": {}}
    several = {"source": "a text", "s": [0, 3], "s-metadata": {}}
    found = [samples(write_manifest(tmp_path, line))["output/00000000"] for line in (boxes, masks, several)]
    assert npy(found[0]["boxes.npy"]).tolist() == [[2, 10, 20, 30, 40]]
    assert found[1]["mask.png"] == picture(1)
    assert (found[2]["txt"], npy(found[2]["classes.npy"]).tolist()) == (b"a text", [0, 3])


@pytest.mark.parametrize(
    ("lines", "label", "reason"),
    [
        (
            [{"source": "x", "a": 1, "a-metadata": {}, "b": 1, "b-metadata": {}}],
            "",
            "has the labels a, b; name the one",
        ),
        ([{"source": "x", "a": 1, "a-metadata": {}}], "b", "has no label 'b'; it has: a"),
        ([{"source": "x", "a": 1, "a-metadata": {}}, {"source": "y"}], "", "line 2 of .* cannot be read: no 'a'"),
        ([{"source-ref": "nowhere.jpg"}], "", r"there is no file nowhere\.jpg"),
        ([{"image": "x"}], "", "line 1 of .* has neither source-ref nor source"),
        ([], "", r"output\.manifest is empty"),
    ],
)
def test_what_a_manifest_cannot_give_is_told(
    tmp_path: Path, lines: list[dict[str, Any]], label: str, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        samples(write_manifest(tmp_path, *lines), label=label)


# telling formats apart


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.tar", "a.tar.idx", "manifest.json"], "tar"),
        (["a.tgz"], "tar"),
        (["train-00000-of-00002.tfrecord", "b.tfrecord-00001-of-00002"], "tfrecord"),
        (["data.rec"], "recordio"),
        (["x.parquet", "_SUCCESS"], "parquet"),
        (["cat/1.JPG", "dog/2.png", "README.md"], "folder"),
        (["out.manifest"], "ground-truth"),
    ],
)
def test_formats_are_told_by_names(tmp_path: Path, names: list[str], kind: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert guess(str(tmp_path)) == kind


@pytest.mark.parametrize(
    ("names", "call", "reason"),
    [
        ([], guess, "there is nothing at"),
        (["a.tar", "b.csv"], guess, "holds files of the kinds csv, tar; say what to read with --from"),
        (["a.xyz"], guess, "holds no files of a kind known by its name"),
        (["a.xyz"], lambda url: open_source(url, "tar"), "there are no tars at"),
        (["a.xyz"], lambda url: open_source(url, "parket"), r"there is no format 'parket'; did you mean 'parquet'\?"),
    ],
)
def test_sources_that_cannot_be_opened_are_told(
    tmp_path: Path, names: list[str], call: Callable[[str], Any], reason: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=reason):
        call(str(tmp_path))

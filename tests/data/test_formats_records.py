"""RecordIO and TFRecord, held against protobuf's own library and tensorboard's writer; damage is told by record."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.summary.writer.record_writer import RecordWriter

from dltrain.data.formats import recordio, tfrecord, wire
from dltrain.data.formats.records import ReadRecords, scan
from dltrain.data.formats.tape import Tape
from dltrain.errors import UserError

_TYPES = {"float": 2, "double": 1, "int32": 5, "uint64": 4, "int64": 3, "bytes": 12, "string": 9}
_TENSORS = {
    f"{kind}Tensor": {"values": (1, name), "keys": (2, "uint64"), "shape": (3, "uint64")}
    for kind, name in (("Float32", "float"), ("Float64", "double"), ("Int32", "int32"))
}


def schema(
    name: str, messages: dict[str, dict[str, tuple[int, str]]], maps: dict[str, dict[str, tuple[int, str]]]
) -> Any:
    """Messages made without a compiler: repeated fields, packed where they are numbers; single ones named ``!type``."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{name}.proto", package=name, syntax="proto3")
    for message, fields in messages.items():
        made = file.message_type.add(name=message)
        for field, (number, kind) in fields.items():
            one = kind.startswith("!")
            added = made.field.add(name=field, number=number, label=1 if one else 3)
            _set_type(added, kind.lstrip("!"), name)
        for field, (number, value) in maps.get(message, {}).items():
            entry = made.nested_type.add(name=f"{field.capitalize()}Entry")
            entry.options.map_entry = True
            _set_type(entry.field.add(name="key", number=1, label=1), "string", name)
            _set_type(entry.field.add(name="value", number=2, label=1), value, name)
            type_name = f".{name}.{message}.{entry.name}"
            made.field.add(name=field, number=number, label=3, type=11, type_name=type_name)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return lambda message: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{name}.{message}"))()


def _set_type(field: Any, kind: str, package: str) -> None:
    field.type = _TYPES.get(kind, 11)
    if kind not in _TYPES:
        field.type_name = f".{package}.{kind}"


SAGEMAKER = schema(
    "aialgs",
    {
        **_TENSORS,
        "Bytes": {"value": (1, "bytes"), "content_type": (2, "!string")},
        "Value": {
            "float32_tensor": (2, "!Float32Tensor"),
            "float64_tensor": (3, "!Float64Tensor"),
            "int32_tensor": (7, "!Int32Tensor"),
            "bytes": (9, "!Bytes"),
        },
        "Record": {"uid": (3, "!string")},
    },
    {"Record": {"features": (1, "Value"), "label": (2, "Value")}},
)
TENSORFLOW = schema(
    "tensorflow",
    {
        "BytesList": {"value": (1, "bytes")},
        "FloatList": {"value": (1, "float")},
        "Int64List": {"value": (1, "int64")},
        "Feature": {"bytes_list": (1, "!BytesList"), "float_list": (2, "!FloatList"), "int64_list": (3, "!Int64List")},
        "Features": {},
        "Example": {"features": (1, "!Features")},
    },
    {"Features": {"feature": (1, "Feature")}},
)


def example(**features: Any) -> bytes:
    made = TENSORFLOW("Example")
    for name, values in features.items():
        kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(values[0])]
        getattr(made.features.feature[name], kind).value.extend(values)
    return made.SerializeToString()


@settings(deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_numbers_survive_the_wire(values: list[int]) -> None:
    assert wire.integers([memoryview(wire.packed(values))]).tolist() == values
    assert wire.integers([value & 0xFFFFFFFFFFFFFFFF for value in values]).tolist() == values


@settings(deadline=None)
@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1),
    st.lists(st.binary(max_size=300), min_size=1),
)
def test_examples_are_read_as_protobuf_writes_them(
    integers: list[int], floats: list[float], texts: list[bytes]
) -> None:
    found = tfrecord.parse_example(example(i=integers, f=floats, b=texts))
    assert (found["i"].dtype, found["f"].dtype) == (np.int64, np.float32)
    assert found["i"].tolist() == integers
    assert found["f"].tolist() == floats
    assert found["b"] == texts


def test_records_are_read_as_protobuf_writes_them() -> None:
    record = SAGEMAKER("Record")
    record.features["values"].float32_tensor.values.extend([1.5, -2.0, 3.0, 0.25])
    record.features["values"].float32_tensor.shape.extend([2, 2])
    record.features["counts"].int32_tensor.values.extend([-1, 300])
    record.features["sparse"].float64_tensor.values.extend([7.0, 9.0])
    record.features["sparse"].float64_tensor.keys.extend([1, 5])
    record.features["sparse"].float64_tensor.shape.extend([2, 3])
    record.features["image"].bytes.value.append(b"\xff\xd8\xff jpeg")
    record.label["values"].float32_tensor.values.append(4.0)
    record.label["weight"].float64_tensor.values.append(0.5)
    record.uid = "flower-1"
    found = recordio.parse_record(record.SerializeToString())
    assert found["values"].tolist() == [[1.5, -2.0], [3.0, 0.25]]
    assert (found["values"].dtype, found["counts"].dtype) == (np.float32, np.int32)
    assert found["counts"].tolist() == [-1, 300]
    assert found["sparse"].tolist() == [[0, 7.0, 0], [0, 0, 9.0]]
    assert found["image"] == [b"\xff\xd8\xff jpeg"]
    assert (found["label"].tolist(), found["label.weight"].tolist()) == ([4.0], [0.5])
    assert found["uid"] == [b"flower-1"]


def test_a_sparse_row_of_zeros_has_its_shape() -> None:
    record = SAGEMAKER("Record")
    record.features["values"].float32_tensor.shape.append(5)
    assert recordio.parse_record(record.SerializeToString())["values"].tolist() == [0.0] * 5


def test_our_records_are_those_sagemakers_writer_makes() -> None:
    expected = SAGEMAKER("Record")
    expected.features["values"].float32_tensor.values.extend([1.0, 2.0])
    expected.label["values"].int32_tensor.values.append(-3)
    ours = recordio.encode_record({"values": np.array([1, 2], np.float32)}, {"values": np.array([-3], np.int32)})
    assert ours == expected.SerializeToString()
    file = io.BytesIO()
    recordio.write_records(file, [ours])
    # framed as sagemaker.amazon.common._write_recordio does
    assert file.getvalue() == struct.pack("<II", 0xCED7230A, len(ours)) + ours + bytes(-len(ours) % 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_tensors_survive_a_record(dtype: type) -> None:
    values = np.arange(-6, 6).reshape(3, 2, 2).astype(dtype)
    found = recordio.parse_record(recordio.encode_record({"x": values, "raw": b"bytes"}, uid="u"))
    assert found["x"].dtype == dtype
    assert np.array_equal(found["x"], values)
    assert (found["raw"], found["uid"]) == ([b"bytes"], [b"u"])
    with pytest.raises(ValueError, match="a record holds float32, float64, int32 and bytes"):
        recordio.encode_record({"x": values.astype(np.int64)})


@pytest.mark.parametrize("payload", [b"\xff" * 9, b"\x0a\x05ab", b"\x0b\x00", b"\x08", b"\x0a\x02\x08\x01"])
def test_what_is_no_message_is_told(payload: bytes) -> None:
    for parse in (recordio.parse_record, tfrecord.parse_example):
        with pytest.raises(ValueError, match=r"wire type|ends at byte|no number|not bytes"):
            parse(payload)


def write(path: Path, format: str, payloads: list[bytes]) -> bytes:
    with path.open("wb") as file:
        {"tfrecord": tfrecord, "recordio": recordio}[format].write_records(file, payloads)
    return path.read_bytes()


def test_tensorboard_frames_records_as_we_do(tmp_path: Path) -> None:
    payloads = [b"", b"one", bytes(1000)]
    file = io.BytesIO()
    writer = RecordWriter(file)
    for payload in payloads:
        writer.write(payload)
    assert write(tmp_path / "x.tfrecord", "tfrecord", payloads) == file.getvalue()
    assert [payload for _, payload in tfrecord.frames(Tape(io.BytesIO(file.getvalue()), "x"))] == payloads


@pytest.mark.parametrize("format", ["tfrecord", "recordio"])
def test_records_are_indexed_where_they_lie(tmp_path: Path, format: str) -> None:
    payloads = [bytes([number]) * number for number in range(9)]
    data = write(tmp_path / "x", format, payloads)
    found = scan(io.BytesIO(data), "x", format, "folder/x")
    assert (found.bytes, found.crc32c) == (len(data), google_crc32c.value(data))
    assert found.index.key(3) == "folder/x/00000003"
    for number, payload in enumerate(payloads):
        ((field, start, size, crc32c),) = found.index.members(number)
        assert field == {"tfrecord": "tfrecord", "recordio": "record"}[format]
        assert data[start : start + size] == payload
        assert crc32c == google_crc32c.value(payload)


@pytest.mark.parametrize("format", ["tfrecord", "recordio"])
def test_a_file_of_records_cut_anywhere_is_told(tmp_path: Path, format: str) -> None:
    data = write(tmp_path / "x", format, [b"x" * 30, b"y" * 5])
    ends = {0, len(data), len(data) - (21 if format == "tfrecord" else 16)}
    for size in set(range(len(data))) - ends:
        with pytest.raises(UserError, match=r"x (is truncated|has no record).*byte \d+"):
            scan(io.BytesIO(data[:size]), "x", format, "x")


def test_every_flipped_bit_of_a_tfrecord_is_told(tmp_path: Path) -> None:
    data = write(tmp_path / "x", "tfrecord", [b"first", b"second"])
    for byte in range(len(data)):
        damaged = bytearray(data)
        damaged[byte] ^= 4
        with pytest.raises(UserError, match=r"damaged in record|has no record at byte (0|21)"):
            scan(io.BytesIO(damaged), "x", "tfrecord", "x")


def test_recordio_without_its_magic_number_is_told() -> None:
    with pytest.raises(UserError, match="has no record at byte 0, where record 0 should begin"):
        scan(io.BytesIO(b"something else"), "x.rec", "recordio", "x")
    parts = struct.pack("<II", recordio.MAGIC, 1 << 29 | 4) + b"part"
    with pytest.raises(UserError, match="record 0 in parts, as MXNet splits them"):
        scan(io.BytesIO(parts), "x.rec", "recordio", "x")


def test_records_become_samples(tmp_path: Path) -> None:
    jpeg = b"\xff\xd8\xff" + bytes(20)
    features = {"image/encoded": [jpeg], "image/class/label": [7], "image/width": [640], "name": [b"tulip.1"]}
    write(tmp_path / "a.tfrecord", "tfrecord", [example(**features)])
    ((key, fields),) = ReadRecords("tfrecord", str(tmp_path))(str(tmp_path / "a.tfrecord"))
    assert key == "a/00000000"
    assert {name: fields[name] for name in ("jpg", "cls", "name.bin")} == {
        "jpg": jpeg,
        "cls": b"7",
        "name.bin": b"tulip.1",
    }
    assert np.load(io.BytesIO(fields["image_width.npy"])).tolist() == [640]
    chosen = {"cls": "image/class/label", "txt": "name"}
    ((key, fields),) = ReadRecords("tfrecord", str(tmp_path), chosen, "name")(str(tmp_path / "a.tfrecord"))
    assert (key, fields) == ("tulip_1", {"cls": b"7", "txt": b"tulip.1"})
    with pytest.raises(
        UserError, match=r"record 0 of .*a\.tfrecord, at byte 12, cannot be read: there is no column 'nam'"
    ):
        list(ReadRecords("tfrecord", str(tmp_path), {"txt": "nam"})(str(tmp_path / "a.tfrecord")))

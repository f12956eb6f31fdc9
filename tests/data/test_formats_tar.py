"""The tar parser agrees with Python's, with webdataset's naming and with GNU tar; damage is told by member and byte."""

from __future__ import annotations

import io
import random
import re
import shutil
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from dltrain.data.formats import tar
from dltrain.errors import UserError

NAMES = st.text(st.sampled_from("ab/._ü \n"), min_size=1, max_size=12)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def pack(members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def unpack(data: bytes) -> list[tuple[str, int, bytes]]:
    reader = tar.TarReader(io.BytesIO(data), "x.tar")
    return [(member.name, member.offset, reader.read()) for member in reader]


def by_tarfile(data: bytes) -> list[tuple[str, int, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [(info.name, info.offset_data, archive.extractfile(info).read()) for info in archive if info.isreg()]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(FORMATS)),
    lengths=st.lists(st.tuples(st.integers(1, 240), st.integers(0, 1500)), max_size=8),
    seed=st.integers(0, 999),
)
def test_members_are_those_tarfile_finds(kind: str, lengths: list[tuple[int, int]], seed: int) -> None:
    draw = random.Random(seed)
    members = []
    for number, (length, size) in enumerate(lengths):
        if kind == "ustar":
            length = min(length, 90)
        members.append((f"{number}-" + "näme" * (length // 5) + ".bin", draw.randbytes(size)))
    data = pack(members, FORMATS[kind])
    assert unpack(data) == by_tarfile(data)
    assert [(name, body) for name, _, body in unpack(data)] == members


def test_folders_and_links_are_passed_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.REGTYPE):
            info = tarfile.TarInfo(f"kind{kind.decode()}.txt")
            info.type, info.linkname = kind, "kind0.txt"
            archive.addfile(info)
    assert [name for name, _, _ in unpack(buffer.getvalue())] == ["kind0.txt"]


def test_a_pax_header_of_the_whole_archive_holds_for_every_member() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "ours"}) as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    assert unpack(buffer.getvalue()) == by_tarfile(buffer.getvalue())


@settings(max_examples=300, deadline=None)
@given(NAMES)
def test_names_are_split_as_webdataset_does(name: str) -> None:
    key, field = base_plus_ext(name)
    if re.match("__[^/]*__($|/)", name):  # which its iterator passes over before
        key = None
    assert tar.split_name(name) == (None if key is None else (key, field.lower()))


@pytest.mark.parametrize("name", ["____/.", "__meta__/a.png"])
def test_names_that_webdataset_passes_over_are_no_samples(name: str) -> None:
    assert tar.split_name(name) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.c/0001.Left.PNG", ("a/b.c/0001", "left.png")),
        ("./0001.cls", ("./0001", "cls")),
        (".hidden", None),
        ("README", None),
        ("__meta__.json", ("__meta__", "json")),
        ("__meta__/x.json", None),
        ("__meta.json__", None),
    ],
)
def test_what_is_no_part_of_a_sample(name: str, expected: tuple[str, str] | None) -> None:
    assert tar.split_name(name) == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 280), st.integers(0, 8**11 + 5), st.booleans())
def test_headers_are_those_tarfile_writes(length: int, size: int, folders: bool) -> None:
    name = ("folder/" * 40)[: length - 1].strip("/") + "x" if folders else "n" * length
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    try:
        expected = info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError:  # does not fit: then, and only then, a pax header comes before it
        expected = info.tobuf(tarfile.PAX_FORMAT)
    assert tar.header(name, size) == expected


def test_one_pass_gives_index_and_checksums() -> None:
    data = pack([("d/1.png", b"image"), ("d/1.CLS", b"3"), ("d/2.cls", b""), ("README", b"no sample")])
    scan = tar.scan(io.BytesIO(data), "x.tar")
    assert (scan.bytes, scan.crc32c) == (len(data), google_crc32c.value(data))
    assert [scan.index.key(place) for place in range(len(scan.index))] == ["d/1", "d/2"]
    found = {
        (sample, field): (data[start : start + size], crc32c == google_crc32c.value(data[start : start + size]))
        for sample in range(2)
        for field, start, size, crc32c in scan.index.members(sample)
    }
    assert found == {(0, "png"): (b"image", True), (0, "cls"): (b"3", True), (1, "cls"): (b"", True)}


def test_memory_does_not_grow_with_the_tar(tmp_path: Path) -> None:
    with (tmp_path / "large.tar").open("wb") as file:
        for name in ("a.bin", "b.bin"):
            file.write(tar.header(name, 48 << 20))
            file.seek(48 << 20, io.SEEK_CUR)
        file.write(tar.end(0))
    tracemalloc.start()
    with (tmp_path / "large.tar").open("rb") as file:
        assert len(tar.scan(file, "large.tar").index) == 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_a_tar_cut_anywhere_is_told() -> None:
    data = pack([("a.bin", b"1" * 700), ("b.bin", b"2" * 3), ("c.bin", b"")])
    end = len(data) - len(data.rstrip(b"\0"))
    whole = 512 + 1024 + 512 + 512 + 512  # where the blocks of zeros begin
    assert end > 1024
    for size in [*range(0, whole, 100), 512, 1536, 2048, whole]:
        with pytest.raises(UserError, match=rf"x\.tar is truncated: it ends at byte {size}"):
            tar.scan(io.BytesIO(data[:size]), "x.tar")
    with pytest.raises(UserError, match=r"ends at byte 1000, after or in a\.bin"):
        tar.scan(io.BytesIO(data[:1000]), "x.tar")


@pytest.mark.parametrize("byte", [0, 100, 124, 148, 156, 257, 300])
def test_a_damaged_header_is_told(byte: int) -> None:
    data = bytearray(pack([("a.bin", b"1" * 700), ("b.bin", b"2")]))
    data[1536 + byte] ^= 0x15
    with pytest.raises(UserError, match=r"x\.tar has (a damaged|no) header at byte 1536, after or in a\.bin"):
        tar.scan(io.BytesIO(data), "x.tar")


def test_what_is_no_tar_is_told() -> None:
    with pytest.raises(UserError, match=r"x\.tar has (a damaged|no) header at byte 0"):
        tar.scan(io.BytesIO(b"not a tar at all" * 100), "x.tar")


def test_tars_put_together_are_told() -> None:
    one = pack([("a.bin", b"1")])
    with pytest.raises(UserError, match=r"x\.tar goes on behind its end"):
        tar.scan(io.BytesIO(one + pack([("b.bin", b"2")])), "x.tar")


def test_old_programs_checksums_over_signed_bytes_are_accepted() -> None:
    block = bytearray(tar.header("ä.bin", 0))
    signed = sum(byte - 256 if byte > 127 else byte for byte in bytes(block[:148]) + bytes(block[156:])) + 256
    block[148:156] = b"%06o\0 " % signed
    assert [name for name, *_ in unpack(bytes(block) + tar.end(512))] == ["ä.bin"]


def test_sizes_beyond_eleven_octal_digits_are_read() -> None:
    info = tarfile.TarInfo("huge.bin")
    info.size = 1 << 40
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        member = next(iter(tar.TarReader(io.BytesIO(info.tobuf(kind)), "x.tar")))
        assert (member.name, member.size) == ("huge.bin", 1 << 40)


def test_a_sample_that_comes_twice_is_refused() -> None:
    again = pack([("a.png", b"1"), ("b.png", b"2"), ("a.cls", b"3")])
    with pytest.raises(UserError, match=r"x\.tar holds sample 'a' twice, the second at member a\.cls, byte 2560"):
        tar.scan(io.BytesIO(again), "x.tar")
    with pytest.raises(UserError, match=r"x\.tar holds member a\.PNG twice"):
        tar.scan(io.BytesIO(pack([("a.png", b"1"), ("a.PNG", b"2")])), "x.tar")


def test_names_that_are_not_utf8_are_refused() -> None:
    data = pack([("a.bin", b"")]).replace(b"a.bin", b"\xff.bin")
    block = bytearray(data)
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:512]) + 256)
    with pytest.raises(UserError, match="whose name is not UTF-8"):
        tar.scan(io.BytesIO(block), "x.tar")


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
@pytest.mark.parametrize("kind", ["gnu", "oldgnu", "pax", "ustar", "v7"])
def test_what_gnu_tar_writes_is_read(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "class" / "inner"
    folder.mkdir(parents=True)
    names = ["0001.png", "0001.cls"] + ([] if kind in ("ustar", "v7") else ["n" * 150 + ".png"])
    for name in names:
        (folder / name).write_bytes(name.encode() * 50)
    (folder / "link.png").symlink_to("0001.png")
    command = ["tar", "-C", str(tmp_path), f"--format={kind}", "--sort=name", "-cf", str(tmp_path / "x.tar"), "class"]
    subprocess.run(command, check=True)
    found = unpack((tmp_path / "x.tar").read_bytes())
    assert {name: body for name, _, body in found} == {f"class/inner/{name}": name.encode() * 50 for name in names}


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs GNU tar")
@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_sparse_files_are_refused(tmp_path: Path, kind: str) -> None:
    with (tmp_path / "holes.bin").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    command = ["tar", "-C", str(tmp_path), f"--format={kind}", "--sparse", "-cf", str(tmp_path / "x.tar"), "holes.bin"]
    subprocess.run(command, check=True)
    with pytest.raises(UserError, match=r"holds (the|a) sparse file.*--sparse"):
        unpack((tmp_path / "x.tar").read_bytes())

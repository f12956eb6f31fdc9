"""Bytes of a file by slices, mapped or read: the same, and closed when nobody holds them."""

from __future__ import annotations

import gc
import mmap
import os
from pathlib import Path

import pytest

from dltrain.data import pages
from dltrain.data.files import OPEN_SHARDS, Opened
from dltrain.data.pages import Reads, open_pages


def opened(file: Path) -> int:
    return os.open(file, os.O_RDONLY)


@pytest.mark.parametrize("size", [1000, 999, 1001], ids=["as known", "longer", "shorter"])
def test_only_a_file_of_the_size_it_should_have_is_mapped(tmp_path: Path, size: int) -> None:
    file = tmp_path / "shard"
    file.write_bytes(bytes(range(250)) * 4)
    found = open_pages(opened(file), size)
    assert isinstance(found, mmap.mmap) == (size == 1000)
    assert found[10:20] == bytes(range(10, 20))
    assert found[990:1010] == bytes(range(240, 250))


def test_a_file_on_a_network_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_file_system", lambda device: "nfs4")
    file = tmp_path / "shard"
    file.write_bytes(b"0123456789")
    found = open_pages(opened(file), 10)
    assert isinstance(found, Reads)
    assert found[3:7] == b"3456"


def test_the_file_system_of_a_device_is_told_from_the_mounts() -> None:
    if not Path("/proc/self/mountinfo").is_file():
        pytest.skip("there is no /proc/self/mountinfo on this system")
    assert pages._file_system(os.stat("/proc").st_dev) == "proc"
    assert pages._file_system(os.makedev(4000, 77)) == ""


def test_files_are_closed_when_nobody_holds_them(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(bytes(100))
    before, kept = len(os.listdir("/proc/self/fd")), Opened()
    for shard in range(OPEN_SHARDS + 50):
        kept.put(shard, open_pages(opened(file), 100 - shard % 2))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) - before == OPEN_SHARDS
    kept.close_unless(lambda shard: False)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before

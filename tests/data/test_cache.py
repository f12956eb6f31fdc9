"""The node's cache: one download, a bounded size, and nothing to repair whoever dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import google_crc32c
import pytest

from dltrain.data.cache import Entry, Item, NodeCache
from dltrain.errors import UserError

SIZE = 200_000


def content(number: int) -> bytes:
    return random.Random(number).randbytes(SIZE)


def item(number: int) -> Item:
    return Item(f"s3://bucket/{number}", SIZE, google_crc32c.value(content(number)))


def put(cache: NodeCache, number: int, **options: object) -> bool:
    """Fetch an item and compare it; whether there is one."""

    def fill(view: memoryview) -> None:
        view[:] = content(number)

    handle = cache.fetch(item(number), fill, **options)
    if handle is None:
        return False
    assert os.pread(handle, SIZE, 0) == content(number)
    os.close(handle)
    return True


WORKER = """
import os, random, sys, time
from pathlib import Path
from dltrain.data.cache import NodeCache
from tests.data.test_cache import SIZE, content, item
folder, log, budget, seed, rounds = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
cache = NodeCache(folder, budget)
numbers = list(range(12))
for _ in range(rounds):
    random.Random(seed).shuffle(numbers)
    for number in numbers:
        def fill(view):
            with open(log, "a") as file:
                file.write(f"{number}\\n")
            half = SIZE // 2
            view[:half] = content(number)[:half]
            time.sleep(0.01)
            view[half:] = content(number)[half:]
        handle = cache.fetch(item(number), fill)
        assert os.pread(handle, SIZE, 0) == content(number), number
        os.close(handle)
"""


def worker(folder: Path, log: Path, budget: int, seed: int, rounds: int = 1) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", WORKER, str(folder), str(log), str(budget), str(seed), str(rounds)]
    return subprocess.Popen(words, cwd=Path(__file__).parents[2])


def test_processes_that_want_the_same_shards_download_each_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    workers = [worker(tmp_path / "cache", log, 0, seed) for seed in range(4)]
    assert [process.wait(60) for process in workers] == [0] * 4
    assert sorted(map(int, log.read_text().split())) == list(range(12))


def test_the_budget_holds_while_processes_compete_for_it(tmp_path: Path) -> None:
    folder, budget, most = tmp_path / "cache", 5 * SIZE, 0
    workers = [worker(folder, tmp_path / "log", budget, seed, 2) for seed in range(3)]
    while any(process.poll() is None for process in workers):
        most = max(most, sum(entry.bytes for entry in NodeCache(folder, budget).entries()))
        time.sleep(0.002)
    assert [process.wait(60) for process in workers] == [0] * 3
    assert 3 * SIZE <= most <= budget


@pytest.mark.slow
def test_a_random_process_killed_again_and_again_spoils_nothing(tmp_path: Path) -> None:
    folder, budget, chance = tmp_path / "cache", 6 * SIZE, random.Random(0)
    workers = [worker(folder, tmp_path / "log", budget, seed, 1000) for seed in range(4)]
    for turn in range(12):
        time.sleep(chance.uniform(0.2, 0.5))
        place = chance.randrange(len(workers))
        assert workers[place].poll() is None  # none ended by itself: each compares every byte it reads
        workers[place].send_signal(signal.SIGKILL)
        workers[place].wait()
        workers[place] = worker(folder, tmp_path / "log", budget, turn, 1000)
    for process in workers:
        process.kill()
        process.wait()
    cache = NodeCache(folder, budget)
    names = {item(number).name: number for number in range(12)}
    for entry in cache.entries():
        assert (folder / entry.name).read_bytes() == content(names[entry.name])
    assert all(put(cache, number) for number in range(12))
    assert not list(folder.glob("*.part"))


def test_entries_leave_in_the_order_asked_for_and_nothing_else_does(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("the user's")
    (tmp_path / "shard-000000.tar").write_bytes(bytes(10 * SIZE))
    cache = NodeCache(tmp_path, 3 * SIZE)
    for number in (0, 1, 2):
        assert put(cache, number)
    keep = {item(0).name, item(2).name}

    def victims(entries: list[Entry]) -> list[Entry]:
        return [entry for entry in entries if entry.name not in keep]

    assert put(cache, 3, victims=victims)
    assert [cache.holds(item(number)) for number in range(4)] == [True, False, True, True]
    assert not put(cache, 4, victims=lambda entries: [], wait=False)
    assert (tmp_path / "notes.txt").read_text() == "the user's"
    assert (tmp_path / "shard-000000.tar").stat().st_size == 10 * SIZE


def test_whoever_has_a_shard_open_keeps_reading_it(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, SIZE)
    assert put(cache, 0)
    handle = cache.find(item(0))
    assert handle is not None
    assert put(cache, 1)
    assert not cache.holds(item(0))
    assert os.pread(handle, SIZE, 0) == content(0)
    os.close(handle)


def test_a_download_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 3 * SIZE)

    def fill(view: memoryview) -> None:
        raise UserError("cut")

    with pytest.raises(UserError, match="cut"):
        cache.fetch(item(0), fill)
    assert [path.name for path in tmp_path.iterdir()] == [".budget"]
    assert put(cache, 0)


def test_a_busy_shard_is_left_to_its_process_or_waited_for(tmp_path: Path) -> None:
    cache, inside, go_on = NodeCache(tmp_path, 3 * SIZE), threading.Event(), threading.Event()

    def fill(view: memoryview) -> None:
        inside.set()
        go_on.wait(10)
        view[:] = content(0)

    first = threading.Thread(target=lambda: os.close(cache.fetch(item(0), fill)))
    first.start()
    inside.wait(10)
    assert not put(cache, 0, wait=False)
    second = threading.Thread(target=put, args=(cache, 0))
    second.start()
    go_on.set()
    first.join(10)
    second.join(10)
    assert not second.is_alive()
    assert cache.holds(item(0))


def test_what_another_finished_after_the_first_look_is_not_fetched_again(tmp_path: Path) -> None:
    other = NodeCache(tmp_path, 10 * SIZE)

    class Late(NodeCache):
        """Its first look comes just before another process is done."""

        looks = 0

        def find(self, wanted: Item) -> int | None:
            found = super().find(wanted)
            self.looks += 1
            if self.looks == 1:
                assert put(other, 1)
            return found

    def fill(view: memoryview) -> None:
        raise AssertionError("it is there")

    handle = Late(tmp_path, 10 * SIZE).fetch(item(1), fill)
    assert handle is not None
    assert os.pread(handle, SIZE, 0) == content(1)
    os.close(handle)
    assert not list(tmp_path.glob("*.part"))


def test_a_child_forked_during_a_download_does_not_keep_its_lock(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 3 * SIZE)
    children = []

    def fill(view: memoryview) -> None:
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
        children.append(child)
        view[:] = content(0)

    os.close(cache.fetch(item(0), fill))
    cache.drop(item(0))
    assert put(cache, 0, wait=False)
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)


def test_a_shard_larger_than_the_budget_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"s3://bucket/0 has {SIZE} bytes, more than the 1000 .* data\.cache_gib"):
        put(NodeCache(tmp_path, 1000), 0)


def test_on_a_full_disk_others_go_first_and_then_one_sentence_tells(small_disk: Path) -> None:
    cache = NodeCache(small_disk, 100 * SIZE)  # more than the disk has
    for number in range(5):
        assert put(cache, number)
    assert len(cache.entries()) == 2  # 512 KiB hold two
    for entry in cache.entries():
        (small_disk / entry.name).unlink()
    (small_disk / "other").write_bytes(bytes(400_000))
    with pytest.raises(UserError, match=r"disk of .* is full: s3://bucket/9 needs 200000 bytes"):
        put(cache, 9)

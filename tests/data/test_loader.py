"""The loader: the same batches whatever the workers, padding of weight 0, a cursor that moves with the consumer."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest

from dltrain.data.dataset import open_dataset
from dltrain.data.decode import decode_fields
from dltrain.data.loader import Loader
from dltrain.data.order import Order
from dltrain.data.sample import Sample
from dltrain.data.windows import Window
from dltrain.data.writer import ShardWriter
from dltrain.errors import UserError


def number(sample: Sample, random: np.random.Generator | None) -> dict[str, np.ndarray]:
    noise = np.float64(0 if random is None else random.random())
    return {**decode_fields(sample), "noise": noise}


@pytest.fixture
def url(tmp_path: Path) -> str:
    with ShardWriter(str(tmp_path / "data"), samples_per_shard=6) as writer:
        for place in range(22):
            writer.write(f"k{place}", {"cls": str(place).encode()})
    return str(tmp_path / "data")


def loader(url: str, **settings) -> Loader:
    dataset = open_dataset(url)
    order = Order(dataset.shard_sizes, seed=5, lanes=4, window=3, shuffle=settings.pop("shuffle", True))
    return Loader(dataset, order, number, **{"global_batch_size": 8, "augment": True, **settings})


def take(source: Loader, steps: int) -> list:
    return [batch for _, batch in zip(range(steps), source, strict=False)]


@pytest.mark.parametrize("method", ["forkserver", "fork"])
def test_workers_change_nothing(url: str, method: str) -> None:
    alone = take(loader(url), 7)
    helped = take(loader(url, workers=2, start_method=method), 7)
    for one, other in zip(alone, helped, strict=True):
        assert one.keys == other.keys
        assert one.fields["noise"].tolist() == other.fields["noise"].tolist()
        assert one.position.tolist() == other.position.tolist()


def test_ranks_share_out_the_batch_and_augment_alike(url: str) -> None:
    whole = take(loader(url), 3)
    parts = [take(loader(url, rank=rank, ranks=3), 3) for rank in range(3)]
    for step, batch in enumerate(whole):
        expected = dict(
            zip(batch.position.tolist(), zip(batch.keys, batch.fields["noise"].tolist(), strict=True), strict=True)
        )
        found = {}
        for part in parts:
            mine = part[step]
            assert len(mine) == 3  # ceil(8 / 3), the same on every rank
            real = [place for place, weight in enumerate(mine.weight.tolist()) if weight]
            found |= {int(mine.position[p]): (mine.keys[p], float(mine.fields["noise"][p])) for p in real}
            assert all(mine.position[p] == -1 for p in range(3) if p not in real)
        assert found == expected


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_an_evaluation_epoch_counts_every_sample_once_in_equal_steps(url: str, ranks: int) -> None:
    keys, steps = [], set()
    for rank in range(ranks):
        batches = list(loader(url, rank=rank, ranks=ranks, tail="pad", epochs=1, augment=False, shuffle=False))
        steps.add(len(batches))
        keys += [
            key for batch in batches for key, weight in zip(batch.keys, batch.weight.tolist(), strict=True) if weight
        ]
    assert steps == {3}  # ceil(22 / 8)
    assert sorted(keys) == sorted(f"k{place}" for place in range(22))


def test_the_cursor_is_small_json_and_moves_with_the_consumer(url: str) -> None:
    source = loader(url, workers=2, prefetch=4)
    batches = iter(source)
    first = next(batches)
    assert source.position == 8  # not what the workers have fetched ahead
    state = json.loads(json.dumps(source.state_dict()))
    assert len(json.dumps(state)) < 220
    following = next(batches)
    resumed = loader(url)
    resumed.load_state_dict(state)
    assert next(iter(resumed)).keys == following.keys != first.keys


def test_a_changed_data_set_or_order_is_refused(url: str, tmp_path: Path) -> None:
    state = loader(url).state_dict()
    with pytest.raises(UserError, match="data set has changed since the checkpoint"):
        loader(url).load_state_dict({**state, "fingerprint": "0" * 16})
    with pytest.raises(UserError, match=r"data\.lanes is 4, the checkpoint's was 16"):
        loader(url).load_state_dict({**state, "lanes": 16})


def test_too_small_batches_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="global_batch_size is 2, smaller than the 3 data ranks"):
        loader(url, global_batch_size=2, ranks=3)
    with pytest.raises(UserError, match="every sample would be dropped"):
        loader(url, global_batch_size=100, tail="drop")


def test_fields_of_unequal_shape_name_both_samples(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path)) as writer:
        for key, text in (("a", b"[1]"), ("b", b"[1, 2]")):
            writer.write(key, {"json": text})
    dataset = open_dataset(str(tmp_path))
    source = Loader(dataset, Order(dataset.shard_sizes, shuffle=False, lanes=1), number, global_batch_size=2)
    with pytest.raises(UserError, match=r"field 'json' of .*#b has shape \(2,\).*#a has \(1,\)"):
        next(iter(source))


def test_windows_are_the_slices_of_their_series(tmp_path: Path) -> None:
    series = {
        "x": np.arange(20, dtype=np.float32),
        "short": np.zeros(3, np.float32),
        "y": np.arange(14.0).reshape(7, 2),
    }
    import io

    with ShardWriter(str(tmp_path), samples_per_shard=2) as writer:
        for key, values in series.items():
            buffer = io.BytesIO()
            np.save(buffer, values)
            writer.write(key, {"npy": buffer.getvalue(), "cls": b"1"})
    dataset = open_dataset(str(tmp_path), Window(lookback=4, horizon=2, stride=3))
    # (20 - 6) // 3 + 1 = 5 windows of x, none of short; (7 - 6) // 3 + 1 = 1 of y
    assert dataset.shard_sizes == (5, 1)
    samples = dataset.read(np.array([0, 0, 1]), np.array([4, 1, 0]))
    assert [sample.key for sample in samples] == ["x@12", "x@3", "y@0"]
    assert samples[0].fields["values"][:, 0].tolist() == [12, 13, 14, 15, 16, 17]
    assert samples[2].fields["values"].tolist() == series["y"][:6].tolist()
    with pytest.raises(UserError, match="longest has 20"):
        open_dataset(str(tmp_path), Window(lookback=100, horizon=2))


def test_a_window_of_a_long_series_reads_its_own_bytes_alone() -> None:
    import io

    buffer = io.BytesIO()
    np.save(buffer, np.zeros(1_000_000, np.float32))
    with ShardWriter("memory://long") as writer:
        writer.write("long", {"npy": buffer.getvalue(), "cls": b"1"})
    dataset = open_dataset("memory://long", Window(lookback=64, horizon=32))
    files, asked = dataset.reader.files, []
    read = files.read
    files.read = lambda requests: asked.extend(requests) or read(requests)
    dataset.read(np.array([0]), np.array([500_000]))
    assert (0, [(512 + 128 + 4 * 500_000, 96 * 4)]) in asked


def stuck(sample: Sample, random: np.random.Generator | None) -> dict[str, np.ndarray]:
    if sample.key == "k9":
        time.sleep(600)
    return number(sample, random)


@pytest.mark.slow
def test_workers_that_hang_do_not_keep_the_process(url: str) -> None:
    dataset = open_dataset(url)
    order = Order(dataset.shard_sizes, shuffle=False, lanes=1)
    source = iter(Loader(dataset, order, stuck, global_batch_size=4, workers=1, prefetch=4))
    next(source)
    source.close()
    deadline = time.monotonic() + 10
    while multiprocessing.active_children():
        assert time.monotonic() < deadline
        time.sleep(0.05)

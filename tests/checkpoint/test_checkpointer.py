"""Checkpoints: committed last, checked before use, kept by number and by score, and read without running code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from dltrain.checkpoint.checkpointer import Checkpointer, best_checkpoint, committed, step_folder
from dltrain.checkpoint.tensors import load_tensors, read_tensors
from dltrain.config import Config, load_overrides
from dltrain.errors import UserError
from dltrain.mesh import build_mesh
from dltrain.parallel.apply import parallelize
from dltrain.parallel.plain import PlainEngine
from dltrain.runtime.environment import Environment
from dltrain.testing.ranks import run_ranks
from tests.parallel.test_engine import Regression, engine_for, share_of

ALONE = Environment()


def engine(**overrides: str) -> PlainEngine:
    config = load_overrides(Config(), {key.replace("__", "."): value for key, value in overrides.items()})
    mesh = build_mesh(config.parallel, ALONE, torch.device("cpu"))
    return parallelize(Regression(config), config, mesh, torch.device("cpu"))


def step(trained: PlainEngine, number: int) -> None:
    trained.forward_backward(share_of(number, 0, 1), torch.tensor(1.0))
    trained.step(0.01, 0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_is_saved_comes_back(tmp_path: Path, optimizer: str) -> None:
    trained = engine(optim__name=optimizer)
    step(trained, 0)
    saved = Checkpointer(tmp_path, 2, ALONE).save(1, trained, {"step": 1})
    step(trained, 1)
    other = engine(optim__name=optimizer, run__seed="9")
    state = Checkpointer(tmp_path, 2, ALONE).load(saved, other)
    assert state == {"step": 1}
    step(other, 1)
    for (name, one), (_, two) in zip(trained.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_stop_that_takes_longer_than_an_interruption_leaves_is_told_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained, checkpoints = engine(), Checkpointer(tmp_path, 5, ALONE, grace=60)
    for number, (before, told) in enumerate(((30.0, ""), (61.0, "before it 61 s, and an interruption leaves 60"),
                                             (99.0, ""))):  # fmt: skip
        checkpoints.save(number, trained, {}, before)
        said = capfd.readouterr().err
        assert told in said
        assert ("run.grace" in said) == bool(told)


def save_on_rank(rank: int, ranks: int, folder: str, overrides: dict) -> None:
    trained = engine_for(rank, ranks, overrides)
    trained.forward_backward(share_of(0, rank, ranks), torch.tensor(1.0))
    trained.step(0.01, 0.0)
    Checkpointer(Path(folder), 2, Environment(rank, ranks, rank, ranks)).save(1, trained, {})


def load_on_rank(rank: int, ranks: int, folder: str, overrides: dict) -> dict:
    other = engine_for(rank, ranks, {**overrides, "run.seed": 5})
    Checkpointer(Path(folder), 2, Environment(rank, ranks, rank, ranks)).load(committed(Path(folder))[-1], other)
    state = other.state_dict()["model"]
    return {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for name, v in state.items()}


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [((2, {"parallel.dp_shard": 2}), (3, {})), ((1, {}), (2, {"parallel.dp_shard": 2})), ((2, {}), (1, {}))],
    ids=["fsdp x2 to ddp x3", "one to fsdp x2", "ddp x2 to one"],
)
def test_any_layout_loads_what_another_saved(tmp_path: Path, saved_by: tuple, loaded_by: tuple) -> None:
    run_ranks(save_on_rank, saved_by[0], saved_by[0], str(tmp_path), saved_by[1])
    saved = read_tensors(committed(tmp_path)[0])
    for found in run_ranks(load_on_rank, loaded_by[0], loaded_by[0], str(tmp_path), loaded_by[1]):
        for name, tensor in found.items():
            assert torch.equal(tensor, saved[f"model/{name}"])


def test_a_torn_save_is_never_taken_for_a_whole_one(tmp_path: Path) -> None:
    checkpointer, trained = Checkpointer(tmp_path, 5, ALONE), engine()
    first = checkpointer.save(1, trained, {})
    torn = checkpointer.save(2, trained, {})
    (torn / "COMMITTED").unlink()
    assert checkpointer.latest() == first
    later = Checkpointer(tmp_path, 5, ALONE)  # a process that comes after
    assert later.save(2, trained, {"again": 1}) == torn
    assert later.latest() == torn


def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpointer, trained = Checkpointer(tmp_path, 5, ALONE), engine()
    first, second = (checkpointer.save(number, trained, {}) for number in (1, 2))
    file = next(second.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    assert checkpointer.latest() == first
    err = capsys.readouterr().err
    assert f"passing over {second}: {file.name} has" in err
    with pytest.raises(UserError, match="is damaged"):
        checkpointer.load(second, trained)


@pytest.mark.parametrize("damage", ["tensors", "COMMITTED"])
def test_after_a_damaged_checkpoint_the_run_saves_and_keeps_anew(tmp_path: Path, damage: str) -> None:
    checkpointer, trained = Checkpointer(tmp_path, 2, ALONE), engine()
    checkpointer.save(8, trained, {"best": {"step": 8, "metric": "loss", "value": 1.0}})
    later = checkpointer.save(16, trained, {})
    (next(later.glob("*.distcp")) if damage == "tensors" else later / "COMMITTED").write_bytes(b"")
    again = Checkpointer(tmp_path, 1, ALONE)
    found = again.latest()
    assert found == step_folder(tmp_path, 8)
    again.resume_from(found, trained)
    assert best_checkpoint(tmp_path) == found  # marked, though the first process never came to it
    assert again.save(12, trained, {}).is_dir()
    assert again.save(16, trained, {"anew": 1}).is_dir()
    assert Checkpointer(tmp_path, 1, ALONE).latest() == later


def test_a_parameter_that_never_had_a_gradient_does_not_spoil_a_checkpoint(tmp_path: Path) -> None:
    def with_idle() -> PlainEngine:
        made = engine()
        idle = torch.nn.Parameter(torch.zeros(3))
        made.model.register_parameter("idle", idle)
        made.optimizer.param_groups[-1]["params"].append(idle)
        return made

    trained = with_idle()
    step(trained, 0)
    path = Checkpointer(tmp_path, 2, ALONE).save(1, trained, {})
    step(trained, 1)
    other = with_idle()
    Checkpointer(tmp_path, 2, ALONE).load(path, other)
    step(other, 1)
    for (name, one), (_, two) in zip(trained.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpointer, trained = Checkpointer(tmp_path, 2, ALONE), engine()
    for number in range(1, 6):
        checkpointer.save(number, trained, {})
        if number == 2:
            checkpointer.mark_best(2, "accuracy", 0.9)
    assert [path.name for path in committed(tmp_path)] == ["step-00000002", "step-00000004", "step-00000005"]
    assert best_checkpoint(tmp_path) == tmp_path / "step-00000002"
    checkpointer.mark_best(5, "accuracy", 0.95)
    assert [path.name for path in committed(tmp_path)] == ["step-00000004", "step-00000005"]


def test_only_tensors_and_json_are_stored(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, 2, ALONE).save(1, engine(), {"step": 1})
    kinds = sorted(file.name.rpartition(".")[2] for file in path.iterdir())
    assert kinds == ["COMMITTED", "distcp", "json", "metadata"]
    manifest = json.loads((path / "COMMITTED").read_text())
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {"COMMITTED"}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def by_way_of_a_dataclass() -> bytes:
    """A pickle whose every name is of DCP's metadata module: it gives a class a field whose type is code, and has
    `dataclass` compile it."""
    metadata = b"ctorch.distributed.checkpoint.metadata\n"
    return b"\x80\x02" + metadata + b"dataclass\n" + metadata + b"BytesStorageMetadata\n\x85R."


def test_the_metadata_module_is_not_open_as_a_whole(tmp_path: Path) -> None:
    trained = engine()
    path = Checkpointer(tmp_path / "c", 2, ALONE).save(1, trained, {})
    (path / ".metadata").write_bytes(by_way_of_a_dataclass())
    with pytest.raises(UserError, match=r"metadata\.dataclass, which no checkpoint of tensors needs"):
        load_tensors(path, trained.state_dict())


def test_metadata_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = engine()
    path = Checkpointer(tmp_path / "c", 2, ALONE).save(1, trained, {})
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="mkdir, which no checkpoint of tensors needs"):
        load_tensors(path, trained.state_dict())
    assert not Path("evil").exists()


def test_another_model_is_refused_by_the_name_of_its_tensor(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, 2, ALONE).save(1, engine(), {})
    state = engine().state_dict()
    state["model"]["0.weight"] = torch.zeros(7, 7)
    with pytest.raises(
        UserError, match=r"tensor 'model/0.weight' has shape \(16, 6\) in the checkpoint .* and \(7, 7\)"
    ):
        load_tensors(path, state)
    state["model"]["new.weight"] = torch.zeros(1)
    del state["model"]["0.weight"]
    with pytest.raises(UserError, match=r"has no tensor 'model/new.weight'"):
        load_tensors(path, state)

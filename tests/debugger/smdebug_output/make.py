"""Makes the folders beside it with smdebug itself, and ``expected.json`` with what its own trials say of them.

Run in an environment of smdebug's own, as README.md says: ``python make.py``, which replaces what is there.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ["SMDEBUG_TRAINING_END_DELAY_REFRESH"] = "0"

import smdebug.pytorch as smd
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from smdebug.exceptions import TensorUnavailableForStep
from smdebug.trials import create_trial
from torch import nn

STEPS, EVALUATED = {1: 10, 2: 6}, 3
"""By the number of ranks, and the step that an evaluation follows."""

KEPT = {1: ("min", "max", "mean", "std"), 2: ("mean",)}
ABSOLUTE = ("mean", "max", "std")
COMPUTED = ("min", "max", "mean", "std", "variance", "sum")
COLLECTIONS = ("losses", "gradients", "relu")


class Net(nn.Module):
    """Its parts are called by their names in smdebug: ``relu_output_0``, ``Net_conv1.weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu, self.head = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(8, 3)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.head(self.relu(self.conv1(pixels)).flatten(1))
        return hidden


def train(rank: int, folder: str, ranks: int) -> None:
    """Some steps, with an evaluation of two batches between them; of several ranks all write."""
    torch.manual_seed(7)
    model: nn.Module = Net()
    if ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        model = nn.parallel.DistributedDataParallel(model)
    hook = smd.Hook(
        folder,
        save_config=smd.SaveConfig(save_interval=4),
        include_collections=["weights", "biases", "gradients", "losses", "relu"],
        include_workers="all",
        reduction_config=smd.ReductionConfig(
            reductions=list(KEPT[ranks]), abs_reductions=["mean", "max"][:ranks], norms=["l1", "l2"][ranks - 1 :]
        ),
    )
    relu = hook.get_collection("relu")
    relu.include("relu_output")
    relu.save_config = smd.SaveConfig(save_interval=2)
    relu.reduction_config = smd.ReductionConfig(save_raw_tensor=True, reductions=["max"])
    hook.get_collection("biases").reduction_config = smd.ReductionConfig(save_raw_tensor=True)
    loss_of = nn.CrossEntropyLoss()
    hook.register_module(model)
    hook.register_loss(loss_of)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(rank)
    for step in range(STEPS[ranks]):
        _step(hook, model, loss_of, optimizer, generator)
        if step == EVALUATED:
            hook.set_mode(smd.modes.EVAL)
            for _ in range(2):
                with torch.no_grad():
                    _loss(model, loss_of, generator)
            hook.set_mode(smd.modes.TRAIN)
        hook.save_scalar("rate", 0.5 / (1 + step))
    hook.close()
    if ranks > 1:
        dist.destroy_process_group()


def _step(hook: Any, model: nn.Module, loss_of: nn.Module, optimizer: Any, generator: torch.Generator) -> None:
    hook.set_mode(smd.modes.TRAIN)
    optimizer.zero_grad()
    _loss(model, loss_of, generator).backward()
    optimizer.step()


def _loss(model: nn.Module, loss_of: nn.Module, generator: torch.Generator) -> torch.Tensor:
    pixels = torch.randn(3, 1, 4, 4, generator=generator)
    loss: torch.Tensor = loss_of(model(pixels), torch.randint(0, 3, (3,), generator=generator))
    return loss


def expected(folder: str) -> dict[str, Any]:
    """What smdebug's own trial says of a folder."""
    trial = create_trial(folder)
    return {
        "workers": trial.workers(),
        "modes": sorted(mode.name for mode in trial.modes()),
        "steps": {mode.name: trial.steps(mode=mode) for mode in (smd.modes.GLOBAL, *trial.modes())},
        "collections": {name: sorted(trial.tensor_names(collection=name)) for name in COLLECTIONS},
        "tensors": {name: _of_tensor(trial.tensor(name)) for name in trial.tensor_names()},
    }


def _of_tensor(tensor: Any) -> dict[str, Any]:
    steps = tensor.steps()
    found = {str(step): {worker: _at(tensor, step, worker) for worker in tensor.workers(step)} for step in steps}
    return {"steps": steps, "train_steps": tensor.steps(mode=smd.modes.TRAIN), "at": found}


def _at(tensor: Any, step: int, worker: str) -> dict[str, Any]:
    """The value, the reductions that were kept, and those that smdebug computes of the value.

    Norms are not asked of values: for matrices smdebug computes other ones, and for more dimensions it fails.
    """
    kept = tensor.reduction_values(step, worker=worker)
    found: dict[str, Any] = {"kept": {"abs_" * absolute + name: float(kept[name, absolute]) for name, absolute in kept}}
    try:
        found["value"] = tensor.value(step, worker=worker).tolist()
    except TensorUnavailableForStep:
        return found
    asked = [(name, False) for name in COMPUTED] + [(name, True) for name in ABSOLUTE]
    values = {pair: tensor.reduction_value(step, pair[0], worker=worker, abs=pair[1]) for pair in asked}
    found["computed"] = {"abs_" * absolute + name: float(value) for (name, absolute), value in values.items()}
    return found


def main() -> None:
    os.chdir(Path(__file__).parent)  # smdebug keeps the folder's name as it is given
    for folder, ranks in (("one", 1), ("two", 2)):
        shutil.rmtree(folder, ignore_errors=True)
        multiprocessing.spawn(train, (folder, ranks), nprocs=ranks)
    Path("expected.json").write_text(json.dumps({folder: expected(folder) for folder in ("one", "two")}) + "\n")


if __name__ == "__main__":
    main()

"""What smdebug's hook adds to a step, run by :mod:`benchmarks.smdebug` with the interpreter of smdebug's environment.

    python smdebug_peer.py '{"layers": 25, "width": 256, "batch": 32, "steps": 4, "rounds": 7, "folder": "...",
                             "reductions": {"reductions": ["max"]}}'

Imports nothing of dltrain. The last line on standard output is one JSON object: seconds of CPU by round, with the hook
and without.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from importlib.metadata import version
from typing import Any

import smdebug.pytorch as smd
import torch
from torch import nn


class Loop:
    """Plain PyTorch over one batch, with or without a hook."""

    def __init__(self, asked: dict[str, Any], folder: str) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(asked["width"], asked["width"]) for _ in range(asked["layers"])]
        self._model, self._loss = nn.Sequential(*layers), nn.CrossEntropyLoss()
        if folder:
            self._hook = smd.Hook(
                folder,
                save_config=smd.SaveConfig(save_interval=1),
                include_collections=["weights", "biases", "gradients"],
                reduction_config=smd.ReductionConfig(**asked["reductions"]),
            )
            self._hook.register_module(self._model)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4, fused=True)
        self._inputs = torch.randn(asked["batch"], asked["width"])
        self._targets = torch.zeros(asked["batch"], dtype=torch.int64)

    def train(self, steps: int) -> None:
        """Some steps."""
        for _ in range(steps):
            self._optimizer.zero_grad()
            self._loss(self._model(self._inputs), self._targets).backward()
            self._optimizer.step()


def seconds(loop: Loop, steps: int) -> float:
    """Of CPU, of all threads of the process."""
    gc.collect()
    started = time.process_time()
    loop.train(steps)
    return time.process_time() - started


def main(asked: dict[str, Any]) -> None:
    """Measure, bare and with the hook in turn; print the result."""
    torch.set_num_threads(1)
    bare, hooked = Loop(asked, ""), Loop(asked, asked["folder"])
    found: dict[str, list[float]] = {"bare": [], "hooked": []}
    for loop in (bare, hooked):
        loop.train(2)
    for _ in range(asked["rounds"]):
        found["bare"].append(seconds(bare, asked["steps"]))
        found["hooked"].append(seconds(hooked, asked["steps"]))
    versions = {name: version(name) for name in ("smdebug", "torch", "numpy", "protobuf")}
    print(json.dumps({**found, "versions": versions, "python": sys.version.split()[0]}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""The loop that dltrain is measured against: plain PyTorch, nothing of dltrain.

It logs nothing, measures nothing, and reads no value on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import repeat

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from benchmarks.case import Case


class BareLoop:
    """A model, its optimizer, and the loop over them."""

    def __init__(self, case: Case) -> None:
        self._case = case
        torch.manual_seed(case.seed)
        model = case.build().to(case.device)
        if case.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if case.compile:
            model.compile()
        self.model: nn.Module = model.train()
        self._optimizer = AdamW(
            [
                {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": case.weight_decay},
                {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=case.learning_rate,
            fused=True,
        )

    def prepare(self, steps: int) -> Callable[[], object]:
        """What trains for ``steps`` when called."""
        return partial(self._train, repeat((self._case.inputs, self._case.targets), steps))

    def _train(self, batches: repeat[tuple[torch.Tensor, torch.Tensor]]) -> None:
        case, model, optimizer = self._case, self.model, self._optimizer
        device = case.device
        layout = torch.channels_last if case.channels_last else torch.preserve_format
        parameters = list(model.parameters())
        for inputs, targets in batches:
            inputs = inputs.to(device, non_blocking=True, memory_format=layout)
            targets = targets.to(device, non_blocking=True)
            if case.bf16:
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    logits = model(case.prepare(inputs))
            else:
                logits = model(case.prepare(inputs))
            loss = F.cross_entropy(logits.float(), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            if case.max_norm:
                clip_grad_norm_(parameters, case.max_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

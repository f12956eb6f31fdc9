"""Batch norm over the samples of all data ranks (Ioffe and Szegedy, "Batch Normalization", ICML 2015).

torch's ``SyncBatchNorm`` refuses CPU tensors and knows no pipelines; this one takes any device and the group of ranks
that hold the same part of the model and see other samples. Statistics are of one micro-batch over that group; samples
of weight 0, with which a last batch is filled up, count in them.

    synchronise(model, mesh.data_group())
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dltrain.errors import UserError


class Ranks:
    """A process group that a copied module shares with its original."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self

    def sum(self, values: Tensor) -> Tensor:
        """Over the ranks, in place."""
        dist.all_reduce(values, group=self._group)
        return values

    def rows(self, values: Tensor) -> Tensor:
        """[ranks, n] of every rank's [n]."""
        rows = values.new_empty(self._group.size(), len(values))
        dist.all_gather(list(rows.unbind()), values, group=self._group)
        return rows


Normalise = Callable[[Tensor, float, Ranks], tuple[Tensor, Tensor, Tensor, Tensor]]


class SynchronisedBatchNorm(_BatchNorm):
    """Any of torch's batch norms, made by :func:`synchronise`; [n, channels] or [n, channels, ...], any float type.

    In training it normalises by the mean and variance of all ranks, in fp32; in evaluation it is what it was.
    """

    ranks: Ranks
    normalise: Normalise

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm takes two dimensions or more, not {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        normalised, mean, variance, count = self.normalise(input, self.eps, self.ranks)
        if self.running_mean is not None:
            self._follow(mean, variance * (count / (count - 1).clamp(min=1)))
        shape = (1, -1, *[1] * (input.dim() - 2))
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Running statistics, as torch keeps them: of unbiased variances."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.num_batches_tracked.float().reciprocal() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def synchronise(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Make every batch norm of the model take its statistics over ``group``, in place; ``None`` is one rank alone.

    Modules stay the same objects and parameters keep their names. Raises :class:`UserError` for a batch norm with a
    forward of its own, which would be lost.
    """
    # a graph of the compiler would have to hold the collectives; saying so imports it, for seconds
    normalise = None if group is None else torch.compiler.disable(_normalise)  # type: ignore[no-untyped-call]
    for name, module in model.named_modules():
        if group is None or not isinstance(module, _BatchNorm):
            continue
        if type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            raise UserError(
                f"precision.batch_norm is synchronised, and {name} is a {type(module).__name__} with a forward of its "
                "own; give precision.batch_norm local, or take one of torch's batch norms"
            )
        module.__class__ = SynchronisedBatchNorm
        synchronised = cast(SynchronisedBatchNorm, module)
        synchronised.ranks, synchronised.normalise = Ranks(group), cast(Normalise, normalise)


def _normalise(values: Tensor, eps: float, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised values in fp32, and mean [channels], biased variance [channels] and count [] of all ranks."""
    normalised, mean, variance, count = _Normalise.apply(values.float(), eps, ranks)  # type: ignore[no-untyped-call]
    return normalised, mean, variance, count


class _Normalise(torch.autograd.Function):
    """With g the gradient of the normalised values y, and means over all samples of all ranks:

    gradient of x = (g - mean(g) - y mean(g y)) / deviation
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, eps: float, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, variance, count = _statistics(values, ranks)
        inverse = torch.rsqrt(variance + eps)
        normalised = (values - _spread(mean, values)) * _spread(inverse, values)
        ctx.save_for_backward(normalised, inverse, count)
        ctx.ranks = ranks
        ctx.mark_non_differentiable(mean, variance, count)
        return normalised, mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        normalised, inverse, count = ctx.saved_tensors
        sums = torch.cat([_over_samples(gradient), _over_samples(gradient * normalised)])
        mean, slope = (ctx.ranks.sum(sums) / count).chunk(2)
        rest = gradient - _spread(mean, gradient) - normalised * _spread(slope, gradient)
        return rest * _spread(inverse, gradient), None, None


def _statistics(values: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over all ranks, from each rank's own by the parallel rule of Chan, Golub and
    LeVeque (1979): sums of squares would lose the variance of values far from 0."""
    channels = values.shape[1]
    variance, mean = torch.var_mean(values, [0, *range(2, values.dim())], correction=0)
    own = values.new_full((1,), values.numel() / channels)
    rows = ranks.rows(torch.cat([mean, variance, own]))
    means, variances, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
    count = counts.sum()
    mean = (means * counts).sum(0) / count
    variance = ((variances + (means - mean).square()) * counts).sum(0) / count
    return mean, variance, count


def _over_samples(values: Tensor) -> Tensor:
    return values.sum([0, *range(2, values.dim())])


def _spread(channels: Tensor, like: Tensor) -> Tensor:
    return channels.view(1, -1, *[1] * (like.dim() - 2))

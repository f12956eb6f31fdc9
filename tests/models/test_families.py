"""Models that recipes offer: their plans fit, and torchvision's keep torchvision's names."""

from __future__ import annotations

import pytest
import torch

from dltrain.errors import UserError
from dltrain.models.timeseries import mixer
from dltrain.models.vision import convnext, resnet
from dltrain.models.vision.torchvision import torchvision_model
from dltrain.parallel.pipeline.cut import chain
from dltrain.parallel.plan import Plan
from dltrain.parallel.tensor import splits_of
from tests.conftest import Cli


def test_resnet_keeps_torchvisions_names_and_numbers_and_its_forward_is_its_chain() -> None:
    ours, theirs = resnet.resnet("resnet18", 5).eval(), torchvision_model("resnet18", num_classes=5).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 32, 32)
    values = images
    for link in chain(ours, resnet.PLAN):
        values = link.module(values)
    assert torch.equal(ours(images), theirs(images))
    assert torch.equal(ours(images), values)
    assert len(resnet.PLAN.modules(ours)) == 8
    with pytest.raises(UserError, match="does not say how to split its layers"):
        splits_of(ours, resnet.PLAN, 2)


@pytest.mark.parametrize(
    ("model", "plan", "shape", "splits"),
    [
        pytest.param(
            lambda: convnext.convnext("convnext_tiny", 5),
            convnext.PLAN,
            (1, 3, 32, 32),
            36,
            marks=pytest.mark.slow,
        ),
        (lambda: mixer.Mixer(24, 6, 2, depth=3), mixer.PLAN, (1, 24, 2), 12),
    ],
    ids=["convnext", "mixer"],
)
def test_a_plan_fits_its_model(model, plan: Plan, shape: tuple[int, ...], splits: int) -> None:
    built = model().eval()
    inputs = torch.randn(shape)
    values = (inputs,)
    for link in chain(built, plan):
        values = (link.module(*values, *((inputs,) if link.again else ())),)
    assert torch.equal(built(inputs), values[0])
    assert len(splits_of(built, plan, 2)) == splits
    assert plan.modules(built)


def test_a_mixer_moves_with_its_series() -> None:
    """What is standardised away comes back: the forecast of a shifted and scaled past is shifted and scaled."""
    model, past = mixer.Mixer(24, 6, 2).eval(), torch.randn(3, 24, 2)
    torch.testing.assert_close(model(past * 5 + 300), model(past) * 5 + 300, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("timeseries/forecast", "--preset", "co2", "--model.name", "mixer"),
        ("image/classify", "--preset", "digits", "--model.name", "resnet18", "--precision.batch_norm", "synchronised"),
    ],
    ids=["mixer", "resnet18"],
)
def test_recipes_train_them_on_two_ranks(words: tuple[str, ...], cli: Cli) -> None:
    short = ("--run.length", "3st", "--schedule.warmup", "0st", "--evaluation.every", "0st")
    done = cli("train", *words, "--nproc", "2", *short, timeout=250)
    assert done.status == 0, done.err
    assert done.result["step"] == 3

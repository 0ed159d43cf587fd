"""What makes one call like another."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashcore.fast import relaunch
from tests.tensors import normal

SHAPE = (2, 3, 1, 8)


@pytest.fixture(params=["by torch.compile's guards", "by their attributes"])
def likeness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[..., bool]]:
    """``likeness`` with the guards, and without."""
    if request.param == "by their attributes":
        monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)
    return relaunch.likeness


def test_tensors_like_the_first_are_alike(likeness: Callable[..., Callable[..., bool]]) -> None:
    are_alike = likeness(normal(*SHAPE), normal(*SHAPE))

    assert are_alike(normal(*SHAPE, seed=1), normal(*SHAPE, seed=2))
    with torch.no_grad():
        assert are_alike(normal(*SHAPE), normal(*SHAPE))


@pytest.mark.parametrize(
    "other",
    [
        normal(2, 3, 2, 8),
        normal(3, 2, 1, 8).transpose(0, 1),
        normal(*SHAPE, dtype=torch.float16),
        normal(*SHAPE).to("meta"),
        normal(*SHAPE).requires_grad_(),
        torch.nn.Parameter(normal(*SHAPE), requires_grad=False),
        normal(*SHAPE).tolist(),
        None,
    ],
    ids=["shape", "strides", "dtype", "device", "grad", "type", "list", "nothing"],
)
def test_a_difference_in_one_tensor_is_seen(likeness: Callable[..., Callable[..., bool]], other: Tensor | None) -> None:
    are_alike = likeness(normal(*SHAPE), normal(*SHAPE))

    assert not are_alike(other, normal(*SHAPE))
    assert not are_alike(normal(*SHAPE), other)

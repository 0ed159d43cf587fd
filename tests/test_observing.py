"""What is observed of a kernel says what it does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from properties.__main__ import main
from properties.capabilities import Capabilities, NotOffered
from properties.subjects.adapter import Adapter, Call
from properties.subjects.observing import observe


def attend(call: Call) -> torch.Tensor:
    """In float32, by products and a softmax; a query that sees no key is NaN."""
    q, k, v = call.query.float(), call.repeated(call.keys).float(), call.repeated(call.values).float()
    logits = q @ k.mT * call.scale
    if call.mask is not None:
        logits = logits.masked_fill(~call.mask, -torch.inf)
    return (logits.softmax(dim=-1) @ v).to(call.query.dtype)


class Kernel(Adapter):
    """A kernel made of a function of the call."""

    name = "kernel"
    capabilities = Capabilities(cache="none", lse=False, tiles=False, overflow=False, blind=False, policies={})

    def __init__(self, function: Callable[[Call], torch.Tensor] = attend, **offered: Any) -> None:
        self.function = function
        self.capabilities = replace(self.capabilities, **offered)

    def run(self, call: Call) -> torch.Tensor:
        """Attend."""
        return self.function(call)


def masked_mean(call: Call) -> torch.Tensor:
    """A mask that is a number, which takes part where nothing else does."""
    q, k, v = call.query, call.repeated(call.keys), call.repeated(call.values)
    assert call.mask is not None
    logits = (q @ k.mT * call.scale).masked_fill(~call.mask, -1e30)
    return logits.softmax(dim=-1) @ v


def visible_only(call: Call) -> torch.Tensor:
    """Query by query, over the keys that it sees."""
    out = torch.zeros_like(call.query)
    assert call.mask is not None
    for b, i in torch.cartesian_prod(torch.arange(out.shape[0]), torch.arange(out.shape[2])).tolist():
        sees = call.mask[b, 0, i]
        k, v = call.repeated(call.keys)[b][:, sees], call.repeated(call.values)[b][:, sees]
        weights = (call.query[b, :, i : i + 1] @ k.mT * call.scale).softmax(dim=-1)
        out[b, :, i : i + 1] = weights @ v
    return out


def by_batch(call: Call) -> torch.Tensor:
    """A result that depends on the number of rows."""
    return attend(call) * (1 + call.query.shape[0] * 2.0**-20)


def by_stride(call: Call) -> torch.Tensor:
    """A result that depends on where heads lie."""
    return attend(call) * (1 + call.query.stride(1) * 2.0**-20)


def by_time() -> Callable[[Call], torch.Tensor]:
    """A result that depends on the call before."""
    calls = iter(range(10**6))
    return lambda call: attend(call) * (1 + next(calls) % 2 * 2.0**-20)


def default_scale(call: Call) -> torch.Tensor:
    """A scale of 0 is taken for none given."""
    return attend(replace(call, scale=call.scale or 0.125))


def refuses_negative(call: Call) -> torch.Tensor:
    """As an implementation says that it does not take a call."""
    if call.scale < 0:
        raise NotOffered("scales below 0")
    return attend(call)


@pytest.mark.parametrize(
    ("function", "seen"),
    [
        (
            attend,
            {"a query that sees no key": "NaN", "NaN in a hidden value": "NaN", "NaN in a hidden key": "no effect"},
        ),
        (attend, {"NaN in a visible value": "its element", "scale 0": "taken", "scale -1/2": "taken"}),
        (attend, dict.fromkeys(("bits across runs", "bits across batches", "bits across layouts"), "the same")),
        (masked_mean, {"a query that sees no key": "mean of all values"}),
        (visible_only, {"a query that sees no key": "0", "NaN in a hidden value": "no effect"}),
        (by_batch, {"bits across batches": "differ in 20 of 20", "bits across runs": "the same"}),
        (by_stride, {"bits across layouts": "differ in 20 of 20", "bits across runs": "the same"}),
        (by_time(), {"bits across runs": "differ in 20 of 20"}),
        (default_scale, {"scale 0": "wrong result", "scale -1/2": "taken"}),
        (refuses_negative, {"scale 0": "taken", "scale -1/2": "not offered: scales below 0"}),
    ],
)
def test_what_a_kernel_does_is_seen(function: Callable[[Call], torch.Tensor], seen: dict[str, str]) -> None:
    observed = observe(Kernel(function))

    assert {matter: observed[matter] for matter in seen} == seen


def test_what_cannot_be_asked_is_said() -> None:
    observed = observe(Kernel(ops=("attention_with_kv_cache",), scales="default"))

    assert observed["a query that sees no key"] == "there is none"
    assert observed["scale 0"] == "no such argument"


def test_a_kernel_that_raises_is_observed_to_raise() -> None:
    def raises(call: Call) -> torch.Tensor:
        raise RuntimeError(call)

    assert set(observe(Kernel(raises)).values()) == {"raises RuntimeError"}


def test_the_command_prints_what_is_observed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["subjects", "--observe", "torch-sdpa-math"]) == 0
    assert re.search("NaN in a visible value +│ its element ", capsys.readouterr().out)

    assert main(["subjects", "--observe", "tests.test_observing:attend"]) == 2
    assert "tests.test_observing:attend must be an Adapter" in capsys.readouterr().err

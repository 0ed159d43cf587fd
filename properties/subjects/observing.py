"""What a kernel does where kernels differ, seen on small calls: ``python -m properties subjects NAME --observe``.

An observation is no promise: it says what one release did here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from properties import device
from properties.capabilities import NotOffered
from properties.guards import torch_dtype
from properties.subjects.adapter import Adapter, Call, Result

PROBLEMS = 20
"""Random problems for each question about bits."""
BATCH = 8
CACHED = 40


def observe(adapter: Adapter) -> dict[str, str]:
    """What it does, by the matter in question; a call that it refuses is one of the answers."""
    probes: dict[str, Callable[[Adapter], str]] = {
        "a query that sees no key": _empty_row,
        "NaN in a hidden value": lambda kernel: _hidden(kernel, "value"),
        "NaN in a hidden key": lambda kernel: _hidden(kernel, "key"),
        "NaN in a visible value": _visible,
        "scale 0": lambda kernel: _scaled(kernel, 0.0),
        "scale -1/2": lambda kernel: _scaled(kernel, -0.5),
        "bits across runs": lambda kernel: _bits(kernel, lambda call: call),
        "bits across batches": lambda kernel: _bits(kernel, first_row),
        "bits across layouts": _layouts,
    }
    found = {}
    for matter, probe in probes.items():
        try:
            found[matter] = probe(adapter)
        except NotOffered as lacking:
            found[matter] = f"not offered: {lacking}"
        except Exception as error:  # whatever somebody else's kernel raises is an answer
            found[matter] = f"raises {type(error).__name__}"
    return found


def problem(adapter: Adapter, *, seed: int = 0, batch: int = 1, cached: int = 1, q_len: int = 2) -> Call:
    """Normal values, causal; new tokens on a cache, or without one where there is none."""
    offered, where = adapter.capabilities, device.current()
    dtype = torch_dtype("float32" if "float32" in offered.dtypes else offered.dtypes[0])
    head_dim = min(offered.head_dims, key=lambda size: abs(size - 64))
    kv_heads = 2
    heads = kv_heads * max(group for group in (1, 2) if group in offered.groups)
    random = torch.Generator().manual_seed(seed)

    def normal(num_heads: int, tokens: int) -> torch.Tensor:
        drawn = torch.randn(batch, num_heads, tokens, head_dim, generator=random)
        return drawn.to(where, dtype)

    return Call(
        query=normal(heads, q_len),
        new_keys=normal(kv_heads, q_len),
        new_values=normal(kv_heads, q_len),
        seq_lens=(cached,) * batch,
        new_lens=(q_len,) * batch,
        is_causal=True,
        scale=head_dim**-0.5,
        has_cache=True,
        cache_max_len=cached + q_len,
        buffers=(normal(kv_heads, cached), normal(kv_heads, cached)) if cached else None,
    )


def output(adapter: Adapter, call: Call) -> torch.Tensor:
    """[batch, num_q_heads, q_len, head_dim] float32, on the host."""
    result = adapter.run(replace(call))  # what a call has worked out is not passed on
    out = result.out if isinstance(result, Result) else result
    return out.float().cpu()


def changed(call: Call, change: Callable[[torch.Tensor], torch.Tensor], rows: int | None = None) -> Call:
    """The call with every tensor changed, and the lengths of the first ``rows`` rows."""
    return replace(
        call,
        query=change(call.query),
        new_keys=change(call.new_keys),
        new_values=change(call.new_values),
        buffers=None if call.buffers is None else (change(call.buffers[0]), change(call.buffers[1])),
        seq_lens=call.seq_lens[:rows],
        new_lens=call.new_lens[:rows],
    )


def first_row(call: Call) -> Call:
    """The first row of the batch alone."""
    return changed(call, lambda tensor: tensor[:1], rows=1)


def transposed(call: Call) -> Call:
    """Heads after tokens in memory."""
    return changed(call, lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2))


def _empty_row(adapter: Adapter) -> str:
    """Four causal queries on two keys: the first sees none of them."""
    call = problem(adapter, cached=0, q_len=4)
    keys, values = call.new_keys[:, :, :2], call.new_values[:, :, :2]
    plain = replace(call, new_keys=keys, new_values=values, has_cache=False)
    if "attention" not in adapter.capabilities.ops:
        return "there is none"
    row, seen = output(adapter, plain)[0, :, 0], call.repeated(values).float().cpu()[0]
    if row.isnan().all():
        return "NaN"
    if not row.any():
        return "0"
    return "mean of all values" if _near(row, seen.mean(dim=1)) else "something else"


def _hidden(adapter: Adapter, which: str) -> str:
    """Whether a NaN in the newest token, which the first of two causal queries does not see, reaches its output."""
    call = problem(adapter)
    clean = output(adapter, call)[:, :, 0]
    tensor = {"key": call.new_keys, "value": call.new_values}[which]
    tensor[:, :, -1] = math.nan
    dirty = output(adapter, call)[:, :, 0]
    if torch.equal(clean, dirty):
        return "no effect"
    return "NaN" if dirty.isnan().all() else "changes the output"


def _visible(adapter: Adapter) -> str:
    """How far one NaN in an element of the oldest value, which all see, reaches."""
    call = problem(adapter)
    assert call.buffers is not None
    call.buffers[1][:, :, 0, 3] = math.nan
    reached = output(adapter, call).isnan()
    if reached.all():
        return "the whole row"
    others = torch.arange(reached.shape[3]) != 3
    exactly = reached[..., 3].all() and not reached[..., others].any()
    return "its element" if exactly else "something else"


def _scaled(adapter: Adapter, scale: float) -> str:
    if adapter.capabilities.scales == "default":
        return "no such argument"
    call = replace(problem(adapter), scale=scale)
    query, keys, values = (x.double().cpu() for x in (call.query, call.repeated(call.keys), call.repeated(call.values)))
    assert call.mask is not None
    logits = (query @ keys.mT * scale).masked_fill(~call.mask.cpu(), -math.inf)
    return "taken" if _near(output(adapter, call), (logits.softmax(dim=-1) @ values).float()) else "wrong result"


def _bits(adapter: Adapter, change: Callable[[Call], Call], q_len: int = 1, is_plain: bool = False) -> str:
    """Whether the first row of decode steps has the same bits after a change that should not matter."""
    differ = 0
    for seed in range(PROBLEMS):
        call = problem(adapter, seed=seed, batch=BATCH, cached=CACHED, q_len=q_len)
        if is_plain:
            call = replace(call, new_keys=call.keys, new_values=call.values, buffers=None, has_cache=False)
        one, other = output(adapter, call), output(adapter, change(call))
        differ += not torch.equal(one[:1], other[:1])
    return f"differ in {differ} of {PROBLEMS}" if differ else "the same"


def _layouts(adapter: Adapter) -> str:
    """Without a cache where that can be, because what is joined with cached tokens has a layout of its own."""
    return _bits(adapter, transposed, q_len=2, is_plain="attention" in adapter.capabilities.ops)


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To a hundredth: enough to tell one rule from another."""
    return torch.allclose(one, other, rtol=0.01, atol=0.01)

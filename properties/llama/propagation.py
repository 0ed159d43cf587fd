"""How far the logits may be from the exact ones, given how far the attention outputs may be.

Let F(e) be the logits of the model in float64, when e is added to the attention outputs. F(0) is the exact model, and
the model whose attention outputs are replaced by those flashcore gave is F(e) with

    e = a - attention(q, k, v),    q, k, v of that replay.

With q', k', v' for what flashcore was given, which differ from q, k, v by what the float32 layers before rounded,

    |e| <= |a - attention(q', k', v')| + |attention(q', k', v') - attention(q, k, v)| <= budget + carried.

So, with the Jacobian J of F at 0 by automatic differentiation and the remainder R = F(e) - F(0) - J e,

    |F(e) - F(0)| <= |J| (budget + carried) + |R|.

Nothing is dropped: the budget is derived, and carried and R are computed, in float64. What the logits of the float32
model differ from F(e) by is the rounding of the library's own layers, and is computed too. That none of these hides a
fault of flashcore is shown apart from this: the budgets by comparing every layer with the exact result, and the rest by
``replay``, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from properties.llama.capture import LayerCall
from properties.llama.replay import attention_named

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LogitBound:
    """Bounds and what they consist of, one for each of the functions of the logits that were asked for.

    Attributes:
        exact: values in the exact model.
        replayed: values in float64 with flashcore's attention outputs.
        attention: |J| budget.
        carried: |J| carried.
        remainder: |R|.
    """

    exact: Float64Array
    replayed: Float64Array
    attention: Float64Array
    carried: Float64Array
    remainder: Float64Array

    @property
    def total(self) -> Float64Array:
        """Bound of |replayed - exact|."""
        return self.attention + self.carried + self.remainder

    def verdict(self, computed: float) -> tuple[str, bool]:
        """How far the computed value of a single function is off, in words, and whether that is within its bound."""
        other = abs(computed - float(self.replayed[0]))
        off, allowed = abs(computed - float(self.exact[0])), other + float(self.total[0])
        words = (
            f"off by {off:.1e}, bound {allowed:.1e} = attention {self.attention[0]:.1e} + carried {self.carried[0]:.1e}"
            f" + remainder {self.remainder[0]:.1e} + other layers {other:.1e}"
        )
        return words, off <= allowed


def in_float64(model: Any) -> Any:
    """A copy of the model that computes in float64; the rotation's float32 cosines are part of the model."""
    exact = copy.deepcopy(model).double().eval()
    for parameter in exact.parameters():
        parameter.requires_grad_(False)
    for module in list(exact.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, _RMSNorm(child))
    return exact


class _RMSNorm(torch.nn.Module):
    """The library's own computes in float32, whatever it is given."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., size] in float64."""
        result: Tensor = self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.epsilon)
        return result


def joined(steps: Sequence[Sequence[LayerCall]], layer: int, name: str) -> Float64Array:
    """What a layer was given or returned for one sequence over all its forward passes, [heads, tokens, head_dim]."""
    if name in ("key", "value"):
        array: Float64Array = getattr(steps[-1][layer].rows[0], name)
        return array
    parts = [step[layer].outs[0] if name == "out" else step[layer].rows[0].query for step in steps]
    return np.concatenate(parts, axis=1)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[1, heads, tokens, head_dim] in float64, causal, for automatic differentiation."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    tokens = query.shape[2]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ value


def exact_logits(exact_model: Any, ids: Tensor) -> Tensor:
    """F(0): logits [tokens, vocabulary] in float64."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return _attend(query, key, value, module.scaling).transpose(1, 2), None

    with torch.no_grad():
        return _logits(exact_model, ids, attend)


def replayed_logits(exact_model: Any, ids: Tensor, steps: Sequence[Sequence[LayerCall]], look: Any = None) -> Tensor:
    """F(e): logits [tokens, vocabulary] in float64 with the attention outputs of ``steps``.

    Args:
        exact_model: from ``in_float64``.
        ids: [1, tokens]
        steps: the recorded layers of each forward pass; one row each.
        look: called with each layer's module, query, key, value and the output put in place of its own.
    """

    def given(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        out = _sent(joined(steps, module.layer_idx, "out"), ids)
        if look is not None:
            look(module, query, key, value, out)
        return out.transpose(1, 2), None

    with torch.no_grad():
        return _logits(exact_model, ids, given)


def _sent(array: Float64Array, like: Tensor) -> Tensor:
    return torch.from_numpy(array)[None].to(like.device)


def bound(exact_model: Any, ids: Tensor, steps: Sequence[Sequence[LayerCall]], wanted: Any) -> LogitBound:
    """Bound the error of functions of the logits of one sequence that flashcore computed in ``steps``.

    Args:
        exact_model: from ``in_float64``.
        ids: [1, tokens], everything that was fed to the model.
        steps: the recorded layers of each forward pass; one row each.
        wanted: logits [tokens, vocabulary] -> vector of what is to be bounded.
    """
    errors: list[Tensor] = []
    carried: list[Tensor] = []

    def compare(module: Any, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        here = _attend(query, key, value, module.scaling)
        q, k, v = (_sent(joined(steps, module.layer_idx, name), ids) for name in ("query", "key", "value"))
        errors.append(out - here)
        carried.append((_attend(q, k, v, module.scaling) - here).abs())

    replayed = wanted(replayed_logits(exact_model, ids, steps, compare))
    added = [torch.zeros_like(error, requires_grad=True) for error in errors]

    def perturbed(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        out = _attend(query, key, value, module.scaling) + added[module.layer_idx]
        return out.transpose(1, 2), None

    exact = wanted(_logits(exact_model, ids, perturbed))
    budgets = [
        _sent(np.concatenate([step[n].expected(0)[1] for step in steps], axis=1), ids) for n in range(len(added))
    ]
    from_budget, from_carried, first_order = (np.zeros(len(exact)) for _ in range(3))
    basis = torch.eye(len(exact), dtype=torch.float64, device=ids.device)
    for start in range(0, len(exact), CHUNK):
        chunk = slice(start, start + CHUNK)
        rows = torch.autograd.grad(exact, added, basis[chunk], retain_graph=True, is_grads_batched=True)
        for n, jacobian in enumerate(rows):
            flat = jacobian.reshape(len(jacobian), -1)
            from_budget[chunk] += (flat.abs() @ budgets[n].reshape(-1)).cpu().numpy()
            from_carried[chunk] += (flat.abs() @ carried[n].reshape(-1)).cpu().numpy()
            first_order[chunk] += (flat @ errors[n].reshape(-1)).cpu().numpy()
    at_zero, at_e = exact.detach().cpu().numpy(), replayed.cpu().numpy()
    return LogitBound(at_zero, at_e, from_budget, from_carried, np.abs(at_e - at_zero - first_order))


CHUNK = 32
"""Rows of the Jacobian at once."""


def _logits(model: Any, ids: Tensor, attention: Any) -> Tensor:
    with attention_named("float64", attention):
        model.set_attn_implementation("float64")
        logits: Tensor = model(ids, use_cache=False).logits[0]
    return logits

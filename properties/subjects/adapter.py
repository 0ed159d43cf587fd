"""Somebody else's kernel in a few lines: a class with a name, what it offers, and ``run``.

    class Mine(Adapter):
        name = "mine"
        capabilities = Capabilities(lse=False, cache="none", tiles=False, policies={})

        def run(self, call: Call) -> torch.Tensor:
            return my_attention(call.query, call.keys, call.values, mask=call.mask, scale=call.scale)

``as_subject`` makes of it what the suite calls. Whatever the adapter does not do itself - joining cached and new
tokens, keeping lengths, the rows of padding - is done here.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from properties.capabilities import Capabilities
from properties.subjects import Subject, permissive
from references.arithmetic_model import ArithmeticModel


class KVCache(tuple[torch.Tensor, torch.Tensor]):
    """``(k_cache, v_cache)`` with the lengths of its rows and whatever the adapter keeps beside them."""

    seq_lens: torch.Tensor
    state: Any

    def __new__(
        cls, k_cache: torch.Tensor, v_cache: torch.Tensor, seq_lens: torch.Tensor, state: Any = None
    ) -> KVCache:
        """Wrap two buffers [batch, num_kv_heads, capacity, head_dim] and the lengths [batch] of their rows."""
        cache = super().__new__(cls, (k_cache, v_cache))
        cache.seq_lens, cache.state = seq_lens, state
        return cache


@dataclass(frozen=True, eq=False)
class Call:
    """One call as an adapter sees it.

    Attributes:
        query: [batch, num_q_heads, q_len, head_dim].
        new_keys, new_values: [batch, num_kv_heads, q_len, head_dim]; without a cache all keys, of any number.
        seq_lens: slots valid in each row before the call.
        new_lens: real new tokens of each row.
        is_causal: aligned bottom-right.
        scale: of the logits, the default resolved.
        has_cache: False for attention without a cache.
        cache_max_len: slots that the cache may have.
        buffers: (k_cache, v_cache) of the call before, None on a first call.
        state: what the adapter returned beside them.
    """

    query: torch.Tensor
    new_keys: torch.Tensor
    new_values: torch.Tensor
    seq_lens: tuple[int, ...]
    new_lens: tuple[int, ...]
    is_causal: bool
    scale: float
    has_cache: bool
    cache_max_len: int = 0
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None
    state: Any = None

    @property
    def q_len(self) -> int:
        """Columns of the query."""
        return self.query.shape[2]

    @property
    def group_size(self) -> int:
        """Query heads a kv head."""
        return self.query.shape[1] // self.new_keys.shape[1]

    @property
    def query_lens(self) -> tuple[int, ...]:
        """Real queries of each row."""
        return self.new_lens if self.has_cache else (self.q_len,) * self.query.shape[0]

    @property
    def kv_lens(self) -> tuple[int, ...]:
        """Keys of each row, the new ones included."""
        if not self.has_cache:
            return (self.new_keys.shape[2],) * self.query.shape[0]
        return tuple(old + new for old, new in zip(self.seq_lens, self.new_lens, strict=True))

    @cached_property
    def keys(self) -> torch.Tensor:
        """[batch, num_kv_heads, max(kv_lens), head_dim]: cached, then new; zeros after the end of a shorter row."""
        return self._joined(0, self.new_keys)

    @cached_property
    def values(self) -> torch.Tensor:
        """As ``keys``."""
        return self._joined(1, self.new_values)

    def _joined(self, which: int, new: torch.Tensor) -> torch.Tensor:
        if not self.has_cache:
            return new
        joined = new.new_zeros((*new.shape[:2], max(self.kv_lens, default=0), new.shape[3]))
        for b, (old, more) in enumerate(zip(self.seq_lens, self.new_lens, strict=True)):
            if self.buffers is not None:
                joined[b, :, :old] = self.buffers[which][b, :, :old]
            joined[b, :, old : old + more] = new[b, :, :more]
        return joined

    @property
    def is_square(self) -> bool:
        """As many queries as keys in every row: where all alignments of a causal mask agree."""
        return set(self.kv_lens) <= {self.q_len} and not any(self.seq_lens)

    @property
    def is_full(self) -> bool:
        """Every query sees every key: no mask is needed."""
        return not self.is_causal and len(set(self.kv_lens)) <= 1

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """[batch, 1, q_len, keys], True where a query sees a key; None if all see all.

        A query of padding sees what the last real one sees, or the first slot if there is none.
        """
        if self.is_full:
            return None
        device = self.query.device
        kv_lens = torch.tensor(self.kv_lens, device=device)[:, None, None]
        key = torch.arange(self.keys.shape[2], device=device)[None, None, :]
        last = kv_lens - 1
        if self.is_causal:
            # Of the last real query; without a cache all queries are real.
            real = torch.tensor(self.new_lens, device=device)[:, None, None]
            last = last - (real - 1 - torch.arange(self.q_len, device=device)[None, :, None]).clamp_min(0)
        if self.has_cache:
            last = last.clamp_min(0)
        return (key <= last).expand(-1, self.q_len, -1)[:, None]

    def repeated(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keys or values with one head a query head, for kernels that know no groups."""
        return tensor.repeat_interleave(self.group_size, dim=1)


@dataclass(frozen=True, eq=False)
class Result:
    """What a call gave.

    Attributes:
        out: [batch, num_q_heads, q_len, head_dim].
        lse: [batch, num_q_heads, q_len] float32, natural logarithm.
        buffers: (k_cache, v_cache) after the call, of kernels that have a cache.
        state: passed to the next call on this cache.
    """

    out: torch.Tensor
    lse: torch.Tensor | None = None
    buffers: tuple[torch.Tensor, torch.Tensor] | None = None
    state: Any = None


class Adapter:
    """A kernel: one instance for each process.

    Attributes:
        name: as in ``--subject NAME``.
        capabilities: what it offers.
        requires: packages that must be installed, as pip names them, and the modules they are.
        slow: whether a case takes seconds, as when a shape is compiled: cases are small on a GPU too, and one that runs
            for minutes is no hang yet.
    """

    name: str
    capabilities: Capabilities
    requires: ClassVar[dict[str, str]] = {}
    slow: ClassVar[bool] = False

    def run(self, call: Call) -> torch.Tensor | Result:
        """Attend; raise what the kernel raises, or NotOffered where it says that it does not take such a call."""
        raise NotImplementedError

    def model(self, device: str) -> ArithmeticModel:
        """Its arithmetic, for the error budget."""
        return permissive(device)

    @classmethod
    def missing(cls) -> list[str]:
        """The packages it requires that are not installed."""
        return [name for name, module in cls.requires.items() if importlib.util.find_spec(module) is None]


class Plain(Adapter):
    """A function ``f(q, k, v)`` without a cache; it also gets those of scale, is_causal and return_lse that it takes.

    It is asked for what mathematics says and nothing else; ``CAPABILITIES`` in its module says more, or less.
    """

    def __init__(self, function: Callable[..., Any], declared: Capabilities | None) -> None:
        """Read its arguments."""
        self.function = function
        self.name = function.__name__
        self.arguments = set(inspect.signature(function).parameters)
        self.capabilities = declared or Capabilities(
            ops=("attention",),
            masks=(False, True) if "is_causal" in self.arguments else (False,),
            scales="any" if "scale" in self.arguments else "default",
            lse="return_lse" in self.arguments,
            cache="none",
            overflow=False,
            tiles=False,
            blind=False,
            policies={},
        )

    def run(self, call: Call) -> torch.Tensor | Result:
        """Pass it what it takes."""
        options = {"scale": call.scale, "is_causal": call.is_causal, "return_lse": True}
        options = {name: value for name, value in options.items() if name in self.arguments}
        result = self.function(call.query, call.keys, call.values, **options)
        return Result(*result) if isinstance(result, tuple) else result


def as_subject(adapter: Adapter, spec: str) -> Subject:
    """What the suite calls."""

    def attention_with_kv_cache(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past_key_value: Any = None,
        seq_lens: torch.Tensor | None = None,
        cache_max_len: int = 4096,
        update_cache: bool = True,
        block_m: int | None = None,
        block_n: int | None = None,
        scale: float | None = None,
        *,
        is_causal: bool = False,
        new_lens: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> Any:
        del block_m, block_n
        if seq_lens is None:
            seq_lens = getattr(past_key_value, "seq_lens", None)
        batch = query.shape[0]
        call = Call(
            query,
            key,
            value,
            (0,) * batch if past_key_value is None or seq_lens is None else tuple(seq_lens.tolist()),
            (key.shape[2],) * batch if new_lens is None else tuple(new_lens.tolist()),
            is_causal,
            query.shape[3] ** -0.5 if scale is None else scale,
            True,
            cache_max_len,
            None if past_key_value is None else tuple(past_key_value),
            getattr(past_key_value, "state", None),
        )
        result = _run(adapter, call)
        out, lse = _without_padding(result, call)
        cache = None
        if update_cache:
            buffers = (call.keys, call.values) if result.buffers is None else result.buffers
            lengths = torch.tensor(call.kv_lens, dtype=torch.int32, device=query.device)
            cache = KVCache(*buffers, lengths, result.state)
        return (out, cache, lse) if return_lse else (out, cache)

    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        block_m: int | None = None,
        block_n: int | None = None,
        scale: float | None = None,
        *,
        is_causal: bool = False,
        return_lse: bool = False,
    ) -> Any:
        del block_m, block_n
        batch, q_len = q.shape[0], q.shape[2]
        scale = q.shape[3] ** -0.5 if scale is None else scale
        result = _run(adapter, Call(q, k, v, (0,) * batch, (q_len,) * batch, is_causal, scale, False))
        out = result.out.contiguous()
        return (out, _lse(result)) if return_lse else out

    return Subject(
        spec=spec,
        attention_with_kv_cache=attention_with_kv_cache,
        attention=attention,
        make_cache=KVCache,
        model=adapter.model,
        slow=adapter.slow,
        capabilities=adapter.capabilities,
        packages=tuple(adapter.requires),
    )


def _run(adapter: Adapter, call: Call) -> Result:
    result = adapter.run(call)
    return result if isinstance(result, Result) else Result(result)


def _lse(result: Result) -> torch.Tensor:
    """The log-sum-exps; zeros, which nobody looks at, of a kernel that returns none."""
    return result.out.new_zeros(result.out.shape[:3], dtype=torch.float32) if result.lse is None else result.lse


def _without_padding(result: Result, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exps with 0 and -inf for the queries of padding, as the contract has it."""
    out, lse = result.out.contiguous(), _lse(result)
    if set(call.new_lens) <= {call.q_len}:
        return out, lse
    columns = torch.arange(call.q_len, device=out.device)
    is_padding = (columns >= torch.tensor(call.new_lens, device=out.device)[:, None])[:, None]
    return out.masked_fill(is_padding[..., None], 0.0), lse.masked_fill(is_padding, -math.inf)

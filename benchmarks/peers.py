"""The kernels flashcore is compared with: PyTorch's own, and others where they can be imported.

A peer is a function from problems to calls, one a problem. Preparing (masks, plans, other layouts) happens there and
is not timed; that favours the peers. A peer that cannot express a problem raises ``Unsupported``.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.inputs import Problem
from benchmarks.timing import Call

Prepare = Callable[[Sequence[Problem]], list[Call]]


class Unsupported(Exception):
    """The peer has no way to say this problem."""


class PeerError(ValueError):
    """--peers names something that is not a peer. One line."""


@dataclass(frozen=True)
class Peer:
    """One kernel to compare with.

    Attributes:
        name: in tables and JSON.
        prepare: problems to calls.
        module: what must be importable; None: comes with PyTorch.
        compiles: takes seconds to compile for every shape, so that it is not run everywhere unless asked for by name.
    """

    name: str
    prepare: Prepare
    module: str | None = None
    compiles: bool = False


def _additive_mask(problem: Problem) -> Tensor | None:
    """0 where visible, -inf where not, in the dtype of the query; None if everything is visible."""
    q_len, kv_len = problem.query.shape[2], problem.key.shape[2]
    positions = torch.arange(kv_len, device=problem.query.device)
    visible = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool, device=problem.query.device)
    if problem.kv_lens is not None:
        visible = visible & (positions < problem.kv_lens[:, None, None, None])
    if problem.is_causal:
        last = torch.arange(q_len, device=problem.query.device) + kv_len - q_len
        visible = visible & (positions <= last[:, None])
    if problem.kv_lens is None and not problem.is_causal:
        return None
    mask = torch.zeros(visible.shape, dtype=problem.query.dtype, device=problem.query.device)
    return mask.masked_fill_(~visible, -torch.inf)


def _sdpa(backend: SDPBackend) -> Prepare:
    def prepare(problems: Sequence[Problem]) -> list[Call]:
        first = problems[0]
        square = first.query.shape[2] == first.key.shape[2]
        arguments: dict[str, Any] = {"enable_gqa": first.grouped}
        if first.is_causal and square:
            arguments["is_causal"] = True  # top-left and bottom-right are the same in a square
        elif first.is_causal and backend != SDPBackend.CUDNN_ATTENTION:
            from torch.nn.attention.bias import causal_lower_right

            if first.grouped:
                raise Unsupported("a bottom-right causal bias is not taken together with grouped heads")
            arguments = {"attn_mask": causal_lower_right(first.query.shape[2], first.key.shape[2])}
        else:
            arguments["attn_mask"] = _additive_mask(first)

        def call_for(problem: Problem) -> Call:
            def call() -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(problem.query, problem.key, problem.value, **arguments)

            return call

        return [call_for(problem) for problem in problems]

    return prepare


def _flex(problems: Sequence[Problem]) -> list[Call]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    first = problems[0]
    device = first.query.device
    batch, _, q_len, _ = first.query.shape
    kv_len = first.key.shape[2]
    offset = kv_len - q_len
    kv_lens = first.kv_lens
    block_mask = None
    if kv_lens is not None:

        def valid(b: Any, h: Any, q: Any, kv: Any) -> Any:
            del h, q
            return kv < kv_lens[b]

        block_mask = create_block_mask(valid, batch, None, q_len, kv_len, device=str(device))
    elif first.is_causal:

        def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
            del b, h
            return q + offset >= kv

        block_mask = create_block_mask(causal, None, None, q_len, kv_len, device=str(device))
    torch.compiler.reset()  # else the ninth shape would find the limit of recompilations and run uncompiled
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def call_for(problem: Problem) -> Call:
        def call() -> Tensor:
            out: Tensor = compiled(
                problem.query, problem.key, problem.value, block_mask=block_mask, enable_gqa=problem.grouped
            )
            return out

        return call

    return [call_for(problem) for problem in problems]


def _flashinfer(problems: Sequence[Problem]) -> list[Call]:
    flashinfer: Any = importlib.import_module("flashinfer")
    first = problems[0]
    batch, num_q_heads, q_len, head_dim = first.query.shape
    num_kv_heads, kv_len = first.key.shape[1], first.key.shape[2]
    page = 16
    if q_len != 1 or kv_len % page:
        raise Unsupported(f"set up for one query and whole pages of {page} here")
    device = first.query.device
    lens = first.kv_lens if first.kv_lens is not None else torch.full((batch,), kv_len, device=device)
    pages = (lens.long() + page - 1) // page
    indptr = torch.cat([torch.zeros(1, dtype=torch.long, device=device), pages.cumsum(0)]).int()
    every = torch.arange(batch * (kv_len // page), dtype=torch.int32, device=device).view(batch, -1)
    used = torch.arange(kv_len // page, device=device) < pages[:, None]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=first.grouped)
    wrapper.plan(
        indptr,
        every[used],
        ((lens.long() - 1) % page + 1).int(),
        num_q_heads,
        num_kv_heads,
        head_dim,
        page,
        q_data_type=first.query.dtype,
        kv_data_type=first.key.dtype,
    )

    def paged(tensor: Tensor) -> Tensor:
        cut = tensor.view(batch, num_kv_heads, kv_len // page, page, head_dim)
        return cut.transpose(1, 2).reshape(-1, num_kv_heads, page, head_dim)

    def call_for(problem: Problem) -> Call:
        query, cache = problem.query[:, :, 0], (paged(problem.key), paged(problem.value))

        def call() -> Tensor:
            out: Tensor = wrapper.run(query, cache)
            return out[:, :, None]

        return call

    return [call_for(problem) for problem in problems]


def _flash_attn_3(problems: Sequence[Problem]) -> list[Call]:
    attend: Any = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache

    def call_for(problem: Problem) -> Call:
        query, key, value = (t.transpose(1, 2) for t in (problem.query, problem.key, problem.value))

        def call() -> Tensor:
            result = attend(query, key, value, cache_seqlens=problem.kv_lens, causal=problem.is_causal)
            out: Tensor = result[0] if isinstance(result, tuple) else result
            return out.transpose(1, 2)

        return call

    return [call_for(problem) for problem in problems]


def _xformers(problems: Sequence[Problem]) -> list[Call]:
    ops: Any = importlib.import_module("xformers.ops")
    first = problems[0]
    if first.kv_lens is not None:
        raise Unsupported("ragged lengths are not set up here")
    bias: Any = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask() if first.is_causal else None
    num_kv_heads = first.key.shape[1]
    group_size = first.query.shape[1] // num_kv_heads

    def call_for(problem: Problem) -> Call:
        query, key, value = (t.transpose(1, 2) for t in (problem.query, problem.key, problem.value))
        if problem.grouped:  # [batch, length, kv heads, group, head_dim]
            query = query.reshape(*query.shape[:2], num_kv_heads, group_size, -1)
            key, value = (t[:, :, :, None].expand(-1, -1, -1, group_size, -1) for t in (key, value))

        def call() -> Tensor:
            out: Tensor = ops.memory_efficient_attention(query, key, value, attn_bias=bias)
            return (out.flatten(2, 3) if problem.grouped else out).transpose(1, 2)

        return call

    return [call_for(problem) for problem in problems]


PEERS = (
    Peer("cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION)),
    Peer("flash", _sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    Peer("flex", _flex, compiles=True),
    Peer("flashinfer", _flashinfer, module="flashinfer"),
    Peer("fa3", _flash_attn_3, module="flash_attn_interface"),
    Peer("xformers", _xformers, module="xformers"),
)


@dataclass(frozen=True)
class Selection:
    """What --peers chose.

    Attributes:
        peers: those to run.
        absent: those that cannot be imported, and why.
        named: whether they were asked for by name; then also those that compile are run everywhere.
    """

    peers: tuple[Peer, ...]
    absent: dict[str, str]
    named: bool

    def for_cell(self, compiling: bool) -> tuple[Peer, ...]:
        """Peers to run in a cell; those that compile only where the cell says so, or by name."""
        return tuple(peer for peer in self.peers if compiling or self.named or not peer.compiles)


def select(text: str) -> Selection:
    """Peers by name, "auto" for all that can be imported, "none" for none.

    Raises:
        PeerError: a name that is not known.
    """
    known = {peer.name: peer for peer in PEERS}
    names = list(known) if text == "auto" else [] if text == "none" else [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise PeerError(f"--peers must be auto, none or a list of {', '.join(known)}, got {name!r}")
    absent: dict[str, str] = {}
    chosen = []
    for name in dict.fromkeys(names):
        reason = _why_absent(known[name])
        if reason is None:
            chosen.append(known[name])
        else:
            absent[name] = reason
    return Selection(tuple(chosen), absent, named=text != "auto")


def _why_absent(peer: Peer) -> str | None:
    if peer.module is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(peer.module)
    except Exception as error:  # whatever somebody else's package raises on import
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return None

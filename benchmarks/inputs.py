"""Inputs of a cell, the float64 result they must give, and the comparison with it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

import flashcore
from benchmarks.shapes import Shape
from flashcore.fast import buffers
from properties.case import Case
from properties.subjects import flashcore as flashcore_subject
from references.error_bounds import budget
from references.rounding import as_format

# Queries compared with the float64 result where a shape has more; every one must be finite.
CHECKED_QUERIES = 48
# Rows are compared with the derived error budget up to this length; beyond, its arrays take longer than the timing.
LONGEST_BUDGETED = 4096
CHUNK_BYTES = 1 << 30


@dataclass(frozen=True)
class Problem:
    """One set of inputs as a peer takes them: the keys and values include the new tokens.

    Attributes:
        query: [batch, num_q_heads, q_len, head_dim]
        key, value: [batch, num_kv_heads, kv_len, head_dim]
        is_causal: bottom-right alignment.
        kv_lens: visible keys of each row, on the device; None: all of them in every row. Not with is_causal.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool
    kv_lens: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse what the reference does not compute."""
        if self.is_causal and self.kv_lens is not None:
            raise ValueError("is_causal must be False where rows have lengths of their own, got True")

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a kv head."""
        return self.query.shape[1] != self.key.shape[1]


@dataclass(frozen=True)
class Appending:
    """The same problem as flashcore takes it: a cache without the new tokens, and the new tokens.

    Attributes:
        problem: what is computed.
        key_new, value_new: [batch, num_kv_heads, q_len, head_dim]
        cache: of exactly as many slots as the longest row will have.
    """

    problem: Problem
    key_new: Tensor
    value_new: Tensor
    cache: flashcore.KVCache

    def call(self) -> Tensor:
        """Attend and append; the cache object stays the one from before, so every call does the same."""
        capacity = self.cache.capacity
        result = flashcore.attention_with_kv_cache(
            self.problem.query,
            self.key_new,
            self.value_new,
            self.cache,
            cache_max_len=capacity,
            is_causal=self.problem.is_causal,
        )
        return result[0]


def torch_dtype(name: str) -> torch.dtype:
    """The dtype a shape names."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def make_problem(shape: Shape, device: str, seed: int) -> Problem:
    """Standard normal queries, keys and values."""
    generator = torch.Generator(device=device).manual_seed(_seed(shape, seed))

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=torch_dtype(shape.dtype))

    return Problem(
        normal(shape.batch, shape.num_q_heads, shape.q_len, shape.head_dim),
        normal(shape.batch, shape.num_kv_heads, shape.kv_len, shape.head_dim),
        normal(shape.batch, shape.num_kv_heads, shape.kv_len, shape.head_dim),
        shape.is_causal,
    )


def make_appending(shape: Shape, device: str, seed: int, kv_lens: Sequence[int] | None = None) -> Appending:
    """A problem whose keys and values lie in a cache, the last ``q_len`` of each row being the new tokens.

    The slots of the new tokens already hold them, so that peers, which do not append, read the same numbers.
    """
    problem = make_problem(shape, device, seed)
    lens = [shape.kv_len] * shape.batch if kv_lens is None else list(kv_lens)
    after = torch.tensor(lens, dtype=torch.int32, device=device)
    before = after - shape.q_len
    slots = before.long()[:, None] + torch.arange(shape.q_len, device=device)  # [batch, q_len]
    rows = torch.arange(shape.batch, device=device)[:, None]
    # An index pair around a slice puts the indexed axes first: [batch, q_len, num_kv_heads, head_dim].
    new = [buffer[rows, :, slots].transpose(1, 2).contiguous() for buffer in (problem.key, problem.value)]
    longest, shortest = max(lens) - shape.q_len, min(lens) - shape.q_len
    cache = flashcore.KVCache(problem.key, problem.value, before, max_len=longest, min_len=shortest)
    # One step, then back: from the second step on a cache has its counters, which is how it is used.
    _, stepped = flashcore.attention_with_kv_cache(
        problem.query, new[0], new[1], cache, cache_max_len=shape.kv_len, is_causal=shape.is_causal
    )[:2]
    cache = flashcore.KVCache(problem.key, problem.value, before, max_len=longest, min_len=shortest, like=stepped)
    ragged = Problem(problem.query, problem.key, problem.value, shape.is_causal, None if kv_lens is None else after)
    return Appending(ragged, new[0], new[1], cache)


def _seed(shape: Shape, seed: int) -> int:
    return zlib.crc32(f"{shape.name} {seed}".encode())


# -- the float64 result ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The float64 result for a sample of the queries, and how far from it a correct kernel may be.

    Attributes:
        queries: [n] which queries.
        out: [batch, num_q_heads, n, head_dim] float64.
        limit: of ``|out - reference| / |reference|``, see ``attend``.
    """

    queries: Tensor
    out: Tensor
    limit: float

    def error(self, out: Tensor) -> float:
        """Relative error in the norm; infinite if anything anywhere is not finite, or the shape is wrong."""
        expected = (*self.out.shape[:2], out.shape[2], self.out.shape[3])
        if tuple(out.shape) != expected or not bool(torch.isfinite(out).all()):
            return math.inf
        difference = out[:, :, self.queries].double() - self.out
        return float(difference.norm() / self.out.norm())


def attend(problem: Problem, checked: int = CHECKED_QUERIES) -> Reference:
    """Compute the reference of a problem, a few batch rows at a time.

    The limit is what rounding to the input format can do to the whole of the output. With unit roundoff u: the
    output is rounded (u times its norm); so is P, whose errors are either common to a row (u times the norm) or
    independent from key to key (u times the norm of the root of sum w^2 v^2). Everything else is float32.
    """
    query, key, value = problem.query, problem.key, problem.value
    batch, num_q_heads, q_len, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1], key.shape[2]
    group_size = num_q_heads // num_kv_heads
    device = query.device
    queries = torch.linspace(0, q_len - 1, min(q_len, checked), dtype=torch.float64, device=device).round().long()
    rows = group_size * len(queries)
    row_bytes = 8 * num_kv_heads * kv_len * (2 * head_dim + 3 * rows)
    step = max(1, CHUNK_BYTES // row_bytes)
    parts = []
    noise = 0.0
    for b in range(0, batch, step):
        span = slice(b, b + step)
        q = query[span][:, :, queries].double().reshape(-1, num_kv_heads, rows, head_dim)
        k, v = key[span].double(), value[span].double()
        scores = q @ k.transpose(-1, -2) * head_dim**-0.5  # [rows of the batch, num_kv_heads, rows, kv_len]
        positions = torch.arange(kv_len, device=device)
        if problem.kv_lens is not None:
            lens = problem.kv_lens[span].long()[:, None, None, None]
            scores.masked_fill_(positions >= lens, -math.inf)
        if problem.is_causal:
            last = (queries + kv_len - q_len).repeat(group_size)[:, None]
            scores.masked_fill_(positions > last, -math.inf)
        weights = torch.softmax(scores, dim=-1)
        parts.append((weights @ v).reshape(-1, num_q_heads, len(queries), head_dim))
        noise += float((weights.square() @ v.square()).sum())
    out = torch.cat(parts)
    u = as_format(str(query.dtype).removeprefix("torch.")).unit_roundoff()
    relative_noise = math.sqrt(noise) / float(out.norm())
    # float32 inputs are neither rounded nor is P; then the float32 arithmetic counts, a few roundings a key.
    limit = u * (2 + relative_noise) if query.dtype != torch.float32 else u * (kv_len + head_dim)
    return Reference(queries, out, limit)


def share_of_budget(shape: Shape, problem: Problem, reference: Reference, out: Tensor) -> float | None:
    """Largest error of flashcore over its derived budget, in the first row and kv head; None where that is costly."""
    if shape.kv_len > LONGEST_BUDGETED or problem.kv_lens is not None:
        return None
    chosen = torch.unique(torch.linspace(0, len(reference.queries) - 1, 8).round().long())
    queries = reference.queries.cpu()[chosen]
    heads = slice(0, shape.group_size)

    def numbers(tensor: Tensor) -> Any:
        return tensor.double().cpu().numpy()

    visible = torch.ones(len(queries), shape.kv_len, dtype=torch.bool)
    if shape.is_causal:
        visible = torch.arange(shape.kv_len) <= (queries + shape.kv_len - shape.q_len)[:, None]
    with_cache = shape.q_len < shape.kv_len or shape.q_len == 1
    case = Case(
        group_size=shape.group_size,
        head_dim=shape.head_dim,
        dtype=cast(Literal["float32", "float16", "bfloat16"], shape.dtype),
        is_causal=shape.is_causal,
        op="attention_with_kv_cache" if with_cache else "attention",
    )
    cached, new = (shape.kv_len - shape.q_len, shape.q_len) if with_cache else (shape.kv_len, 0)
    found = budget(
        numbers(problem.query[0, heads][:, queries.to(problem.query.device)]),
        numbers(problem.key[0, :1]),
        numbers(problem.value[0, :1]),
        visible.numpy(),
        scale=shape.head_dim**-0.5,
        fmt=shape.dtype,
        model=flashcore_subject.model(problem.query.device.type),
        tiles=flashcore_subject.tiles(case, shape.q_len, cached, new),
    )
    expected = numbers(reference.out[0, heads][:, chosen.to(reference.out.device)])
    got = numbers(out[0, heads][:, queries.to(out.device)])
    return float((abs(got - expected) / found.out).max())


@contextmanager
def poisoned() -> Iterator[None]:
    """Whatever flashcore allocates meanwhile is NaN (lengths: -1), so that what it does not write shows."""
    original = buffers.empty

    def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = original(shape, dtype, device)
        return tensor.fill_(math.nan if dtype.is_floating_point else -1)

    buffers.empty = empty
    try:
        yield
    finally:
        buffers.empty = original

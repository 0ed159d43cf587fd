"""The KV cache: two buffers, the lengths of their rows, and what the host knows about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashcore.errors import CacheOverflowError
from flashcore.fast import buffers, relaunch
from flashcore.fast.length_rows import LengthRows

if TYPE_CHECKING:
    from flashcore.fast.relaunch import Call, Relaunch

KEPT = 8
"""Launches, and shapes of scratch, that caches over the same buffers keep."""


class KVCache(tuple[Tensor, Tensor]):
    """Key and value buffers with the number of valid slots of each row.

    A two-element tuple ``(k_cache, v_cache)``, so that it unpacks like one. A call of
    ``attention_with_kv_cache`` appends in place and returns a new ``KVCache`` over the same buffers;
    the one passed in keeps its own lengths and stays valid for them (fork, retry, roll-back).

    Attributes:
        max_len: host-side upper bound of the longest row, or None when only the device knows (after a call
            recorded in a CUDA graph). It lets a call check capacity without synchronising.
        min_len: host-side lower bound of the shortest row, 0 if nothing is known. Only how the work is shared out
            follows from it, no bit of a result.
    """

    max_len: int | None
    min_len: int
    _lineage: _Lineage
    _seq_lens: Tensor | None = None  # None until somebody asks for what lies in a row
    _rows: LengthRows
    _address: int

    def __new__(
        cls,
        k_cache: Tensor,
        v_cache: Tensor,
        seq_lens: Tensor,
        *,
        max_len: int | None = None,
        min_len: int = 0,
        like: KVCache | None = None,
    ) -> KVCache:
        """Wrap buffers [batch, num_kv_heads, capacity, head_dim] whose first ``seq_lens`` slots are valid.

        Args:
            k_cache: keys.
            v_cache: values, same shape.
            seq_lens: [batch] int32.
            max_len: an upper bound of ``seq_lens``; None to let the first call read it from the device.
            min_len: a lower bound of ``seq_lens``; with ``max_len`` near it decode steps of a large batch are faster.
            like: an earlier cache of the same rows, whose fault flag and counters continue.
        """
        self = super().__new__(cls, (k_cache, v_cache))
        self.seq_lens = seq_lens
        self.max_len = max_len
        self.min_len = min_len
        if like is not None and like[0] is k_cache and like[1] is v_cache:
            self._lineage = like._lineage
        else:
            self._lineage = _Lineage((k_cache, v_cache), _new_fault(k_cache.device) if like is None else like.fault)
        return self

    @classmethod
    def allocate(
        cls,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> KVCache:
        """An empty cache of ``capacity`` slots a row; the slots are uninitialised and never read before written."""
        seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        shape = (batch, num_kv_heads, capacity, head_dim)
        k_cache, v_cache = (buffers.empty(shape, dtype, seq_lens.device) for _ in range(2))
        return cls(k_cache, v_cache, seq_lens, max_len=0)

    @property
    def seq_lens(self) -> Tensor:
        """[batch] int32 on the device of the buffers: valid slots of each row."""
        if self._seq_lens is None:
            self._seq_lens = self._rows.tensor(self._address)
        return self._seq_lens

    @seq_lens.setter
    def seq_lens(self, seq_lens: Tensor) -> None:
        self._seq_lens = seq_lens

    @property
    def lengths_address(self) -> int:
        """Where ``seq_lens`` lie."""
        return self._address if self._seq_lens is None else self._seq_lens.data_ptr()

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return int(self[0].shape[2])

    @property
    def is_even(self) -> bool:
        """Whether the host knows that all rows are about as long."""
        return self.max_len is not None and 4 * self.min_len >= 3 * self.max_len

    @property
    def fault(self) -> Tensor:
        """[2] int32 on the host, written by kernels: what ``check`` raises."""
        return self._lineage.fault

    def arrival_counters(self, count: int) -> Tensor:
        """At least ``count`` int32 counters for the split-KV kernel, zero before and after every launch."""
        lineage = self._lineage
        if lineage.arrivals is None or lineage.arrivals.numel() < count:
            counters = buffers.empty([count], torch.int32, self[0].device).zero_()
            if counters.is_cuda and torch.cuda.is_current_stream_capturing():
                return counters  # zeroed by the graph at each replay, not yet now
            lineage.arrivals = counters
        return lineage.arrivals

    def scratch(self, shapes: tuple[Sequence[int], ...]) -> list[Tensor]:
        """Uninitialised float32 tensors of these shapes for what a launch on these buffers does not finish itself."""
        lineage, key = self._lineage, tuple(map(tuple, shapes))
        if key not in lineage.scratch:
            if len(lineage.scratch) >= KEPT:
                lineage.scratch.clear()
            lineage.scratch[key] = [buffers.empty(shape, torch.float32, self[0].device) for shape in shapes]
        return lineage.scratch[key]

    def next_lengths(self, stream: int | None) -> tuple[LengthRows, int]:
        """A row for the lengths after a step on ``stream``: the rows that it is one of, and its address."""
        rows = self._lineage.rows
        address = next(rows.addresses, 0) if rows is not None and rows.stream == stream else 0
        if rows is None or not address:
            rows = self._lineage.rows = LengthRows(len(self[0]), self[0].device, stream)
            address = next(rows.addresses)
        return rows, address

    def appended(self, seq_lens: Tensor, max_len: int, min_len: int) -> KVCache:
        """The same buffers with the lengths after a call."""
        return KVCache(self[0], self[1], seq_lens, max_len=max_len, min_len=min_len, like=self)

    def repeated(self, rows: LengthRows, address: int, max_len: int, min_len: int) -> KVCache:
        """The same buffers with the lengths after a repeated call, which lie in a row of their own."""
        lineage = self._lineage
        after = tuple.__new__(KVCache, lineage.buffers)
        after.max_len = max_len
        after.min_len = min_len
        after._lineage = lineage
        after._rows = rows
        after._address = address
        return after

    def repeat(self, query: object, key: object, value: object, options: tuple[Any, ...]) -> Relaunch | None:
        """The launch of an earlier call on these buffers with such tensors and these options."""
        wanted, lengths = relaunch.key_of(options), self._seq_lens
        for call, again in self._lineage.relaunches:
            reads = call.reads_rows if lengths is None else call.reads(lengths)
            if reads and call.options == wanted and call.are_alike(query, key, value) and again.is_for(self):
                return again
        return None

    def remember(self, call: Call, again: Relaunch) -> None:
        """Keep a launch for later calls; a handful, since each keeps its scratch."""
        if call.may_be_repeated:
            self._lineage.relaunches = [(call, again), *self._lineage.relaunches[: KEPT - 1]]

    def has_fault(self) -> bool:
        """Whether the device has reported something for ``raise_known_faults`` to raise."""
        return self._lineage.fault_view[0] != 0

    def check(self) -> None:
        """Wait for the device and raise what it found that the host could not check beforehand.

        Raises:
            CacheOverflowError: a row of a call recorded in a CUDA graph did not fit; it was not written and
                its length did not change.
            ValueError: a length read on the device was out of range.
        """
        if self[0].is_cuda:
            torch.cuda.synchronize(self[0].device)
        self.raise_known_faults()

    def raise_known_faults(self) -> None:
        """Raise what the device has reported so far; does not wait for it."""
        if not self.has_fault():
            return
        overflow, bad_length = self.fault.tolist()
        if overflow:
            self.fault.zero_()
            raise CacheOverflowError(
                f"row {overflow - 1} of the cache was full in a call that could not be checked beforehand: its new "
                f"tokens were not stored (capacity {self.capacity}); allocate a larger cache and repeat from the "
                "last good state"
            )
        if bad_length:
            self.fault.zero_()
            raise ValueError(
                f"seq_lens[{bad_length - 1}] or new_lens[{bad_length - 1}] must lie inside the cache and q_len in a "
                "call whose lengths could not be checked beforehand, got a value out of range; the row was not stored"
            )


class _Lineage:
    """What the caches over the same buffers share.

    Attributes:
        buffers: keys and values.
        fault: [2] int32 on the host.
        fault_view: the same memory as one int64, quicker to read.
        arrivals: ``KVCache.arrival_counters``.
        relaunches: launches to be repeated, the latest first.
        scratch: ``KVCache.scratch``, by shapes.
        rows: where the lengths after the next step go.
    """

    def __init__(self, buffers: tuple[Tensor, Tensor], fault: Tensor) -> None:
        """Nothing but the buffers and the fault flag."""
        self.buffers = buffers
        self.fault = fault
        self.fault_view = fault.numpy().data.cast("B").cast("q")
        self.arrivals: Tensor | None = None
        self.relaunches: list[tuple[Call, Relaunch]] = []
        self.scratch: dict[tuple[tuple[int, ...], ...], list[Tensor]] = {}
        self.rows: LengthRows | None = None


def _new_fault(device: torch.device) -> Tensor:
    # Pinned host memory: a kernel writes it only when something is wrong, the host reads it without synchronising.
    return torch.zeros(2, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")

"""The second decode step and every later one: the launch of the first, with other pointers.

Checking arguments, planning and Triton's own argument binding cost the host ten times what a decode step costs the
GPU. None of it can come out differently for a call whose shapes, strides, dtypes and options equal those of an earlier
call on the same buffers: such a call repeats the earlier launch. Whatever could differ (lengths that no longer fit, a
reported fault, alignment, a graph being recorded, inputs that require grad) is looked at every time, and sends the call
down the ordinary path, which raises or launches as the contract says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flashcore.fast import buffers, launching, tuning

if TYPE_CHECKING:
    from flashcore.cache import KVCache


SHARED_OUT = ("grid_splits", "splits_per_program", "likely_split_size", "row_programs")
"""Arguments of the kernel that ``_Shares`` has; the last only of the kernel for Hopper, as "shortest"."""

POINTERS = ("q_ptr", "k_new_ptr", "v_new_ptr", "seq_lens_ptr", "out_ptr", "seq_lens_out_ptr")
"""Those that differ from step to step; "lse_ptr" besides, where one is asked for."""

SCRATCH = ("partial_out_ptr", "partial_m_ptr", "partial_l_ptr", "arrivals_ptr")


PLAIN = {bool, int, float, type(None)}
"""Types of the options of a call that may be repeated: others may have changed since."""


class Call:
    """What decides validation, plan and kernel of a call on given buffers.

    Attributes:
        options: of the call, as ``key_of`` has them.
        are_alike: whether three tensors are like its query, key and value.
        reads: whether a tensor is like its lengths.
        reads_rows: whether it reads the rows of ``LengthRows``.
        may_be_repeated: whether there is nothing about it that the ordinary path has to look at every time.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, seq_lens: Tensor, options: tuple[object, ...]
    ) -> None:
        """``seq_lens``: int32; ``options``: the arguments besides the tensors."""
        self.options = key_of(options)
        self.are_alike = likeness(query, key, value)
        self.reads = likeness(seq_lens)
        self.reads_rows = seq_lens.is_contiguous()
        self.may_be_repeated = PLAIN.issuperset(self.options[0]) and not (
            query.requires_grad or key.requires_grad or value.requires_grad
        )


def key_of(options: tuple[object, ...]) -> tuple[Any, ...]:
    """What tells the options of a call from others.

    The types are part of it, and come first: True equals 1, and one of them is an error.
    """
    return tuple(map(type, options)), options, tuning.generation()


def likeness(*tensors: Tensor) -> Callable[..., bool]:
    """A function that says of as many objects whether they are tensors like these.

    They are if they have the same type, shape, strides, dtype and device, and require grad or do not.
    """
    if len(set(map(id, tensors))) == len(tensors):  # torch.compile's guards refuse a tensor that comes twice
        with contextlib.suppress(ImportError):
            from torch._C._dynamo.guards import TensorGuards

            # A quarter of the time of asking for the attributes one by one.
            return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    attributes = [_attributes(tensor) for tensor in tensors]
    return lambda *others: [_attributes(other) for other in others] == attributes


def _attributes(tensor: object) -> tuple[object, ...]:
    if not isinstance(tensor, Tensor):
        return ()
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


class _Shares(NamedTuple):
    """What ``Relaunch`` last shared out: the same for all ``bounds``, which need as many splits."""

    bounds: range
    is_even: bool
    is_alike: bool  # whether the shortest row needs as many, too
    arguments: tuple[int, ...]  # SHARED_OUT
    programs: int  # the grid's first dimension
    kernel_kind: tuple[bool, bool, bool]


class Relaunch:
    """A launch of the split-KV kernel that appended to a ``KVCache``, ready to be repeated.

    Args:
        kernel: the jit function.
        compiled: what it launched, or None in the interpreter.
        arguments: its positional arguments and constexprs, in the order of its signature.
        launch_options: num_warps and the like.
        plan: of the call.
        cache: the buffers.
        query: of the call, for shapes.
        slot_limit: no row may become longer.
        return_lse: whether the call returns an LSE.
        kernel_kind: see ``LaunchPlan.kernel_kind``.
    """

    def __init__(
        self,
        kernel: Any,
        compiled: Any,
        arguments: list[Any],
        launch_options: dict[str, Any],
        plan: tuning.LaunchPlan,
        cache: KVCache,
        query: Tensor,
        slot_limit: int,
        return_lse: bool,
        kernel_kind: tuple[bool, bool, bool],
    ) -> None:
        """Keep what the launch consisted of; tensors as pointers where the launch is repeated directly."""
        self.kernel = kernel
        self.compiled = compiled
        self.arguments = [a.data_ptr() if compiled is not None and isinstance(a, Tensor) else a for a in arguments]
        self.launch_options = launch_options
        self.plan = plan
        self.slot_limit = slot_limit
        self.device = query.device
        self.dtype = query.dtype
        self.out_shape = tuple(query.shape)
        self.lse_shape = self.out_shape[:3] if return_lse else None
        self.q_len = query.shape[2]
        self.cache_pointers = (cache[0].data_ptr(), cache[1].data_ptr())
        rows = [query.shape[0], cache[0].shape[1], plan.grid_splits(slot_limit), query.shape[1] // cache[0].shape[1]]
        rows[3] *= self.q_len
        self.partial_shapes = ([*rows, query.shape[3]], rows, rows)
        self.splits_later = rows[2] > 1
        self.batch, self.num_kv_heads = rows[:2]
        self.heads = rows[0] * rows[1]
        self.row_tiles = tuning.ceil_div(rows[3], plan.block_m)
        self.kernel_kind = kernel_kind
        self.bounds = [name for name in ("max_cached", "shortest") if name in kernel.arg_names]
        self.shared_out = [name for name in SHARED_OUT if name in kernel.arg_names]
        self.shares = _Shares(range(0), False, False, (), 0, (False, False, False))
        self.scratch: list[Tensor] = []
        self.launch: launching.Launch | None = None

    def is_for(self, past: KVCache) -> bool:
        """Whether the kernel is the one for rows as long as those of ``past``, as far as the host knows them."""
        bound, is_even, shares = past.max_len, past.is_even, self.shares
        if bound is not None and (
            bound not in shares.bounds
            or shares.is_even is not is_even
            or shares.is_alike is not (past.min_len in shares.bounds)
        ):
            shares = self.shares = self._share_out(bound, past.min_len, is_even)
        return bound is None or shares.kernel_kind == self.kernel_kind

    def again(
        self, past: KVCache, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, KVCache] | tuple[Tensor, KVCache, Tensor] | None:
        """Repeat the launch for a call that is like it, or return None if the ordinary path has to look at it.

        ``is_for`` has just said that the kernel is the one for ``past``.
        """
        bound, at_lens = past.max_len, past.lengths_address
        if bound is None or bound + self.q_len > self.slot_limit or past.has_fault():
            return None
        k_cache, v_cache = past
        at_query, at_key, at_value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        if (at_query | at_key | at_value | at_lens) % 16 or self.cache_pointers != (
            k_cache.data_ptr(), v_cache.data_ptr(),
        ):  # fmt: skip
            return None
        if torch.is_grad_enabled() and (k_cache.requires_grad or v_cache.requires_grad):
            return None
        if self.compiled is not None and (
            torch.cuda.is_current_stream_capturing() or torch.cuda.current_device() != self.device.index
        ):
            return None
        launch = self.launch or self._prepare(past)
        out = buffers.empty(self.out_shape, self.dtype, self.device)
        stream = launch.current_stream()
        rows, after = past.next_lengths(stream)
        lse, shares = None, self.shares
        bounds = (bound, past.min_len)[: len(self.bounds)]
        changed: list[Any]
        if self.compiled is None:
            changed = [
                *bounds, *shares.arguments,
                query, key, value, past.seq_lens, out, rows.tensor(after),
            ]  # fmt: skip
        else:
            changed = [
                *bounds, *shares.arguments,
                at_query, at_key, at_value, at_lens, out.data_ptr(), after,
            ]  # fmt: skip
        if self.lse_shape is not None:
            lse = buffers.empty(self.lse_shape, torch.float32, self.device)
            changed.append(lse if self.compiled is None else lse.data_ptr())
        launch.again(shares.programs, stream, changed)
        cache = past.repeated(rows, after, bound + self.q_len, past.min_len + self.q_len)
        return (out, cache) if lse is None else (out, cache, lse)

    def _share_out(self, bound: int, shortest: int, is_even: bool) -> _Shares:
        """How many splits there are for rows of up to ``bound`` slots, and how many of them a program takes."""
        size = self.plan.kv_split_size
        last = tuning.ceil_div(bound, size) * size
        splits, gpu, rows = self.plan.grid_splits(bound), tuning.gpu(self.device), self.heads * self.row_tiles
        shares = self.plan.share_out(rows, bound, bound, is_even=is_even, gpu=gpu)
        kind = self.plan.kernel_kind(splits, shares)
        row_programs = tuning.ceil_div(splits, shares.splits_per_program)
        likely = self.plan.likely_split_size(bound, bound, is_even=is_even, shortest=shortest)
        arguments = (splits, shares.splits_per_program, likely, row_programs)[: len(self.shared_out)]
        bounds = range(last - size + 1, last + 1)
        return _Shares(bounds, is_even, shortest in bounds, arguments, self._grid(row_programs)[0], kind)

    def _grid(self, row_programs: int) -> tuple[int, int, int]:
        return self.plan.grid(row_programs, self.num_kv_heads, self.batch, self.row_tiles)

    def _prepare(self, past: KVCache) -> launching.Launch:
        """Allocate the scratch of every later step, however many splits it has, and keep the launch that uses it.

        All steps on these buffers use the same: two launches at once would already race for slots of the cache.
        """
        names = self.kernel.arg_names
        changing = [*self.bounds, *self.shared_out, *POINTERS, *(["lse_ptr"] if self.lse_shape else [])]
        if self.splits_later:
            self.scratch = [*past.scratch(self.partial_shapes), past.arrival_counters(self.heads * self.row_tiles)]
            for name, tensor in zip(SCRATCH, self.scratch, strict=True):
                self.arguments[names.index(name)] = tensor if self.compiled is None else tensor.data_ptr()
        self.launch = launching.repeated(
            self.kernel,
            self.compiled,
            self.arguments,
            self.launch_options,
            changing,
            self._grid(1)[1:],
            self.device.index,
        )
        return self.launch

"""The second decode step and every later one: the launch of the first, with other pointers.

Checking arguments, planning and Triton's own argument binding cost the host ten times what a decode step costs the
GPU. None of it can come out differently for a call whose shapes, strides, dtypes and options equal those of an earlier
call on the same buffers: such a call repeats the earlier launch. Whatever could differ (lengths that no longer fit, a
reported fault, alignment, a graph being recorded, inputs that require grad) is looked at every time, and sends the call
down the ordinary path, which raises or launches as the contract says.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from flashcore.fast import buffers, tuning

if TYPE_CHECKING:
    from flashcore.cache import KVCache


PLAIN = {bool, int, float, type(None)}


def key_of(query: Tensor, key: Tensor, value: Tensor, options: tuple[object, ...]) -> Hashable | None:
    """What decides validation, plan and kernel of a call on given buffers; ``options`` are the other arguments.

    None if an option is of a type that is an error anyway, and may have no hash. The types are part of the key: True
    equals 1, and one of them is an error.
    """
    types = tuple(map(type, options))
    if not PLAIN.issuperset(types):
        return None
    return (
        query.shape, query.stride(), query.dtype, query.device,
        key.shape, key.stride(), key.dtype, key.device,
        value.shape, value.stride(), value.dtype, value.device,
        tuning.generation(), options, types,
    )  # fmt: skip


def reads_lengths_of(seq_lens: Tensor | None) -> bool:
    """Whether a launch that read these lengths reads those of a returned cache, too: as int32, one after the other."""
    return seq_lens is not None and seq_lens.dtype == torch.int32 and seq_lens.is_contiguous()


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
    ) -> None:
        """Keep what the launch consisted of; tensors as pointers where the launch is repeated directly."""
        self.kernel = kernel
        self.compiled = compiled
        self.launch_options = launch_options
        self.plan = plan
        self.slot_limit = slot_limit
        self.return_lse = return_lse
        self.device = query.device
        self.dtype = query.dtype
        self.out_shape = query.shape
        self.lse_shape = query.shape[:3]
        self.lens_shape = cache.seq_lens.shape
        self.q_len = query.shape[2]
        self.cache_pointers = (cache[0].data_ptr(), cache[1].data_ptr())
        self.index = {name: position for position, name in enumerate(kernel.arg_names)}
        self.arguments = [a.data_ptr() if compiled is not None and isinstance(a, Tensor) else a for a in arguments]
        rows = [query.shape[0], cache[0].shape[1], plan.grid_splits(slot_limit), query.shape[1] // cache[0].shape[1]]
        rows[3] *= self.q_len
        self.partial_shapes = ([*rows, query.shape[3]], rows, rows)
        self.splits_later = rows[2] > 1
        self.partials: tuple[Tensor, ...] | None = None
        self.heads = rows[0] * rows[1]
        self.row_tiles = tuning.ceil_div(rows[3], plan.block_m)

    def __call__(
        self, past: KVCache, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, KVCache] | tuple[Tensor, KVCache, Tensor] | None:
        """Repeat the launch for these tensors, or return None if the ordinary path has to look at the call."""
        bound, lens = past.max_len, past.seq_lens
        if bound is None or bound + self.q_len > self.slot_limit or past.has_fault():
            return None
        pointers = (query.data_ptr(), key.data_ptr(), value.data_ptr(), lens.data_ptr())
        if (pointers[0] | pointers[1] | pointers[2] | pointers[3]) % 16 or self.cache_pointers != (
            past[0].data_ptr(), past[1].data_ptr(),
        ):  # fmt: skip
            return None
        if not reads_lengths_of(lens) or lens.shape != self.lens_shape:
            return None
        if lens.device != self.device:
            return None
        if torch.is_grad_enabled() and (
            query.requires_grad or key.requires_grad or value.requires_grad
            or past[0].requires_grad or past[1].requires_grad
        ):  # fmt: skip
            return None
        if self.compiled is not None and (
            torch.cuda.is_current_stream_capturing() or torch.cuda.current_device() != self.device.index
        ):
            return None

        out = buffers.empty(self.out_shape, self.dtype, self.device)
        lse = buffers.empty(self.lse_shape, torch.float32, self.device) if self.return_lse else None
        lens_out = buffers.empty(self.lens_shape, torch.int32, self.device)
        named: dict[str, Tensor | int] = {
            "out_ptr": out, "seq_lens_out_ptr": lens_out, "q_ptr": query, "k_new_ptr": key, "v_new_ptr": value,
            "seq_lens_ptr": lens, "max_cached": bound,
        }  # fmt: skip
        if lse is not None:
            named["lse_ptr"] = lse
        grid_splits = self.plan.grid_splits(bound)
        named["grid_splits"] = grid_splits
        if self.splits_later and self.partials is None:
            # Kept for later steps: two launches at once on one lineage would already race for the same slots.
            self.partials = tuple(buffers.empty(s, torch.float32, self.device) for s in self.partial_shapes)
        if grid_splits > 1 and self.partials is not None:
            named["partial_out_ptr"], named["partial_m_ptr"], named["partial_l_ptr"] = self.partials
            named["arrivals_ptr"] = past.arrival_counters(self.heads * self.row_tiles)
        arguments = self.arguments.copy()
        self._launch(grid_splits * self.heads, arguments, named)
        cache = past.appended(lens_out, bound + self.q_len)
        return (out, cache) if lse is None else (out, cache, lse)

    def _launch(self, programs: int, arguments: list[Any], named: dict[str, Tensor | int]) -> None:
        index = self.index
        if self.compiled is None:
            for name, argument in named.items():
                arguments[index[name]] = argument
            self.kernel[programs, self.row_tiles](*arguments, **self.launch_options)
            return
        for name, argument in named.items():
            arguments[index[name]] = argument.data_ptr() if isinstance(argument, Tensor) else argument
        compiled = self.compiled
        stream = triton.runtime.driver.active.get_current_stream(self.device.index)
        grid = (programs, self.row_tiles, 1)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)

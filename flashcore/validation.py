"""Every check on a caller's input. Messages read ``<argument> must <constraint>, got <value>``.

Nothing here launches, allocates or writes; checks that read the device say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flashcore.errors import CacheOverflowError
from flashcore.fast import interpreter

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
LOG2_E = math.log2(math.e)


def check_tensor(name: str, value: object, axes: str) -> Tensor:
    """A tensor of one of the supported dtypes with the rank that ``axes`` describes.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: of another rank, or requires grad while grad is enabled.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {axes}, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.dim() != 4:
        raise ValueError(f"{name} must have 4 dimensions {axes}, got shape {list(value.shape)}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {value.dtype}")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require grad while grad is enabled, got requires_grad=True; "
            "flashcore is forward only: call it under torch.no_grad() or detach the input"
        )
    return value


def check_alike(name: str, value: Tensor, reference: Tensor, reference_name: str) -> None:
    """Same dtype (TypeError) and device (ValueError) as ``reference``."""
    if value.dtype != reference.dtype:
        raise TypeError(f"{name} must have the dtype of {reference_name} {reference.dtype}, got {value.dtype}")
    if value.device != reference.device:
        raise ValueError(f"{name} must be on the device of {reference_name} {reference.device}, got {value.device}")


def check_shape(name: str, value: Tensor, expected: Sequence[int], axes: str) -> None:
    """Exactly the expected shape."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {axes} = {list(expected)}, got {list(value.shape)}")


def check_heads(query_name: str, query: Tensor, key_name: str, num_kv_heads: int) -> int:
    """The group size: query heads a kv head."""
    num_q_heads, head_dim = query.shape[1], query.shape[3]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{query_name} must have a head_dim from 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if num_kv_heads < 1:
        raise ValueError(f"{key_name} must have at least one head, got {num_kv_heads}")
    if num_q_heads < 1 or num_q_heads % num_kv_heads != 0:
        raise ValueError(
            f"{query_name} must have a multiple of the {num_kv_heads} heads of {key_name}, got {num_q_heads} heads"
        )
    return num_q_heads // num_kv_heads


def check_device(name: str, query: Tensor) -> None:
    """CUDA, or the CPU with Triton's interpreter on."""
    if query.is_cuda or (query.device.type == "cpu" and interpreter.is_on()):
        return
    if query.device.type == "cpu":
        raise RuntimeError(
            f"{name} must be on a CUDA device unless Triton's interpreter is on, got cpu; "
            "to run on the CPU set TRITON_INTERPRET=1 in the environment before importing flashcore"
        )
    raise RuntimeError(f"{name} must be on a CUDA device, got {query.device}")


def check_tile(name: str, value: object) -> int | None:
    """A forced tile: a power of two from 16 to 256, or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or None, got {value!r}")
    if value not in (16, 32, 64, 128, 256):
        raise ValueError(f"{name} must be a power of two from 16 to 256, got {value}")
    return value


def check_scale(scale: object, head_dim: int) -> float:
    """The factor on the logits in base 2, ``scale * log2(e)``, as the float32 value the kernel multiplies by."""
    if scale is None:
        scale = head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float or None, got {scale!r}")
    try:
        scale = float(scale)
    except OverflowError:  # an int beyond every float
        scale = math.inf if scale > 0 else -math.inf
    with np.errstate(over="ignore"):
        qk_scale = float(np.float32(np.float32(scale) * np.float32(LOG2_E)))
    if not math.isfinite(qk_scale):
        raise ValueError(f"scale must be finite, also as float32 times log2(e), got {scale}")
    return qk_scale


def check_flag(name: str, value: object) -> bool:
    """A real bool: a tensor or an int here is a mistake in the order of arguments."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
    return value


def check_count(name: str, value: object, minimum: int) -> int:
    """An int not below ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_cross_check(name: str, value: object, actual: int, owner: str) -> None:
    """``num_query_heads`` and ``num_kv_heads`` only repeat what the shapes say."""
    if value is not None and (isinstance(value, bool) or value != actual):
        raise ValueError(f"{name} must equal the number of heads of {owner} {actual}, got {value!r}")


def check_lengths(name: str, value: object, batch: int, device: torch.device) -> Tensor:
    """A [batch] int32 or int64 tensor on the device of the query. Its values are not read."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor [batch] of int32 or int64, got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {value.dtype}")
    check_shape(name, value, [batch], "[batch]")
    if value.device != device:
        raise ValueError(f"{name} must be on the device of query {device}, got {value.device}")
    return value


def check_range(name: str, values: Sequence[int], upper: int, meaning: str) -> None:
    """Every value in ``[0, upper]``."""
    for b, value in enumerate(values):
        if not 0 <= value <= upper:
            raise ValueError(f"{name}[{b}] must lie in [0, {upper}], {meaning}, got {value}")


def check_capacity(seq_lens: Sequence[int], new_lens: Sequence[int], cache_max_len: int) -> None:
    """No row may grow past ``cache_max_len`` slots.

    Raises:
        CacheOverflowError: names the first row that would.
    """
    for b, (cached, new) in enumerate(zip(seq_lens, new_lens, strict=True)):
        if cached + new > cache_max_len:
            raise CacheOverflowError(
                f"row {b} holds {cached} tokens and {new} new ones do not fit in cache_max_len={cache_max_len}; "
                f"nothing was written: raise cache_max_len to {cached + new} or more, or drop tokens from the row first"
            )


def check_writable(name: str, value: Tensor) -> None:
    """A cache buffer whose slots do not overlap in memory."""
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
        raise ValueError(
            f"{name} must not be expanded (two slots would share memory) when update_cache=True, "
            f"got strides {list(value.stride())}"
        )

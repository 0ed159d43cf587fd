"""What the queries of one forward pass see, as lengths: the mask that transformers hands to every attention layer.

transformers describes padding by a mask [batch, columns], one column a token of the padded batch. A row of a
``KVCache`` holds real tokens only, so that a length says everything: the padding of a row is not stored, neither on
its left nor on its right, and nothing is ever masked. Keys are rotated before they are stored, by the position that
the model gave them, so where they are stored changes no logit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function


@dataclass(frozen=True)
class VisibleTokens:
    """Causal attention over the real tokens of a padded batch.

    Query column ``cached + i`` of a row sees the real tokens of that row in columns up to its own. What a padding
    column gets is 0.

    Attributes:
        cached: columns of earlier calls.
        new: columns of this call, which are those of the query.
        real: [batch, cached + new] bool on the host, which columns hold tokens; None: all of them.
        device: where lengths and indices go.
    """

    cached: int
    new: int
    real: Tensor | None
    device: torch.device

    @property
    def cached_real(self) -> Tensor | None:
        """[batch, cached] bool on the host; None: all real."""
        real = None if self.real is None else self.real[:, : self.cached]
        return None if real is None or bool(real.all()) else real

    @functools.cached_property
    def new_lens(self) -> Tensor | None:
        """[batch] int32: real tokens among the new columns of each row; None: all of them."""
        if self.real is None or bool(self.real[:, self.cached :].all()):
            return None
        return self.real[:, self.cached :].sum(1, dtype=torch.int32).to(self.device)

    @functools.cached_property
    def _shifts(self) -> Tensor | None:
        """[batch] padding columns on the left of each row's new tokens, on the host; None: there are none."""
        if self.real is None or self.new == 0:
            return None
        new = self.real[:, self.cached :].to(torch.int64)
        shifts = torch.where(new.any(1), new.argmax(1), 0)
        return shifts if bool(shifts.any()) else None

    def real_first(self, tokens: Tensor) -> Tensor:
        """New tokens [batch, heads, new, head_dim] with the real ones of each row first; a copy only if they move."""
        return tokens if self._shifts is None else tokens.take_along_dim(self._columns(1), dim=2)

    def in_columns(self, out: Tensor) -> Tensor:
        """The inverse of ``real_first``, for outputs."""
        return out if self._shifts is None else out.take_along_dim(self._columns(-1), dim=2)

    def _columns(self, direction: int) -> Tensor:
        assert self._shifts is not None
        columns = (torch.arange(self.new) + direction * self._shifts[:, None]) % self.new
        return columns.to(self.device)[:, None, :, None]


def visible_tokens(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: object = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    config: object = None,
    **_unused: object,
) -> VisibleTokens:
    """The mask interface: what transformers calls once a forward pass. Waits for the device to read a mask, if any.

    Args:
        batch_size: rows.
        q_length: new columns.
        kv_length: all columns, the new ones included.
        q_offset: columns of earlier calls.
        kv_offset: columns that the cache has dropped.
        mask_function: the pattern; plain causal is the only one.
        attention_mask: [batch, kv_length] bool, which columns hold tokens; None: all of them.
        device: of the model.
        config: of the model; it names the feature in an error.

    Raises:
        NotImplementedError: a pattern that lengths cannot express, or a cache of fixed size.
        ValueError: padding between the real tokens of a row, or a mask of another shape.
    """
    if mask_function is not causal_mask_function:
        raise NotImplementedError(f"flashcore attends causally to whole sequences; {_pattern(config)} is not supported")
    if isinstance(q_offset, Tensor) or kv_offset or kv_length != q_offset + q_length:
        raise NotImplementedError(
            "past_key_values must be a FlashCoreCache or a DynamicCache of whole sequences, got a cache that shows "
            f"{kv_length} columns for {q_length} new tokens; static and sliding caches are not supported"
        )
    real = None
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (batch_size, kv_length):
            raise ValueError(
                "attention_mask must cover the cached and the new tokens, [batch, columns] = "
                f"{[batch_size, kv_length]}, got {list(attention_mask.shape)}"
            )
        real = attention_mask.to("cpu", torch.bool)
        real = None if bool(real.all()) else real
    if real is not None:
        _check_contiguous(real[:, q_offset:], q_offset)
    return VisibleTokens(q_offset, q_length, real, torch.device(device))


def _check_contiguous(new: Tensor, first_column: int) -> None:
    """The real tokens of one call lie side by side in every row."""
    is_gap = new.cummax(1).values & ~new & new.flip(1).cummax(1).values.flip(1)
    for b, column in torch.nonzero(is_gap).tolist():
        raise ValueError(
            "attention_mask must mark the new tokens of a row as one block, with padding on its left or right, "
            f"got padding inside the sequence of row {b} at column {first_column + column}"
        )


def _pattern(config: object) -> str:
    for name, feature in (
        ("sliding_window", "sliding-window attention"),
        ("attention_chunk_size", "chunked attention"),
    ):
        if getattr(config, name, None) is not None:
            return f"{feature} ({name}={getattr(config, name)})"
    return "a packed batch (position_ids that restart within a row), a bidirectional or another custom mask"

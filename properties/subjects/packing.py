"""Rows of any lengths as servers hold them: packed one after the other, or in pages that a table lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.functional import pad

PAGE = 16
"""Tokens a page."""


def packed(tensor: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """[tokens of all rows, heads, head_dim] of the first tokens of the rows of [rows, heads, tokens, head_dim]."""
    return torch.cat([row[:, :n].transpose(0, 1) for row, n in zip(tensor, lengths, strict=True)])


def unpacked(packed_rows: torch.Tensor, lengths: Sequence[int], tokens: int) -> torch.Tensor:
    """[rows, heads, tokens, ...] of [tokens of all rows, heads, ...]; zeros after the end of a shorter row."""
    rows = packed_rows.new_zeros((len(lengths), packed_rows.shape[1], tokens, *packed_rows.shape[2:]))
    for row, one in zip(rows, torch.split(packed_rows, list(lengths)), strict=True):
        row[:, : len(one)] = one.transpose(0, 1)
    return rows


def ends(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """[rows + 1] int32: where each row begins, and where the last one ends."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@dataclass(frozen=True, eq=False)
class Pages:
    """Keys and values in pages, those of the first row last: no table is the identity.

    Attributes:
        keys, values: [pages, PAGE, heads, head_dim], zeros after the last token of a row.
        counts: pages of each row.
        table: the pages of all rows, in order.
        last: tokens in the last page of each row, 0 if it has none.
    """

    keys: torch.Tensor
    values: torch.Tensor
    counts: tuple[int, ...]
    table: tuple[int, ...]
    last: tuple[int, ...]


def paged(keys: torch.Tensor, values: torch.Tensor, lengths: Sequence[int]) -> Pages:
    """The first tokens of rows of [rows, heads, tokens, head_dim] in pages."""
    counts = tuple(-(-n // PAGE) for n in lengths)

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        rows = [pad(packed(row[None], [n]), (0, 0, 0, 0, 0, -n % PAGE)) for row, n in zip(tensor, lengths, strict=True)]
        return torch.cat(rows).view(-1, PAGE, tensor.shape[1], tensor.shape[3]).flip(0)

    return Pages(
        cut(keys),
        cut(values),
        counts,
        tuple(reversed(range(sum(counts)))),
        tuple(n - PAGE * max(count - 1, 0) for n, count in zip(lengths, counts, strict=True)),
    )

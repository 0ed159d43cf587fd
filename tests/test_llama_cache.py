"""The cache class: what it holds, where, and what happens to it between two forward passes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore.integrations.transformers import FlashCoreCache, flashcore_attention
from flashcore.integrations.transformers_padding import visible_tokens
from properties import device as devices
from tests import tiny_llamas

CONFIG = tiny_llamas.config(4, 2, 16)
MODULES = [torch.nn.Module() for _ in range(CONFIG.num_hidden_layers)]


def random(rows: int, heads: int, columns: int) -> Tensor:
    return torch.randn(rows, heads, columns, 16, device=devices.current())


def feed(cache: Any, columns: int, mask: Tensor | None = None, rows: int = 3) -> tuple[Tensor, Tensor]:
    """Attend with random new tokens in every layer; returns the keys and values of the first one."""
    fed = []
    cached = cache.get_seq_length()
    visible = visible_tokens(rows, columns, cached + columns, cached, attention_mask=mask, device=devices.current())
    for layer, module in enumerate(MODULES):
        key, value = random(rows, 2, columns), random(rows, 2, columns)
        new_key, new_value = cache.update(key, value, layer)
        flashcore_attention(module, random(rows, 4, columns), new_key, new_value, visible)
        fed.append((key, value))
    return fed[0]


def held(cache: Any, row: int) -> tuple[Tensor, Tensor]:
    """Copies of the real keys and values of a row of the first layer."""
    kv = cache.layers[0].kv
    count = int(kv.seq_lens[row])
    return kv[0][row, :, :count].clone(), kv[1][row, :, :count].clone()


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_it_holds_the_kv_heads_and_nothing_more() -> None:
    cache = FlashCoreCache(CONFIG, max_cache_len=24)
    feed(cache, 5)

    buffers = [buffer for layer in cache.layers for buffer in layer.kv]
    assert all(buffer.shape == (3, CONFIG.num_key_value_heads, 24, 16) for buffer in buffers)
    stored = sum(buffer.untyped_storage().nbytes() for buffer in buffers)
    assert stored == 2 * CONFIG.num_hidden_layers * 3 * CONFIG.num_key_value_heads * 24 * 16 * 4


def test_a_step_appends_in_place() -> None:
    cache = FlashCoreCache(CONFIG, max_cache_len=24)
    key, value = feed(cache, 5)
    addresses = [buffer.data_ptr() for layer in cache.layers for buffer in layer.kv]
    more_key, more_value = feed(cache, 1)

    assert [buffer.data_ptr() for layer in cache.layers for buffer in layer.kv] == addresses
    for row in range(3):
        expected = torch.cat([key[row], more_key[row]], 1), torch.cat([value[row], more_value[row]], 1)
        assert same(held(cache, row), expected)
    assert (cache.get_seq_length(), cache.get_mask_sizes(2, 0), cache.get_max_length(0)) == (6, (8, 0), 24)


def test_padding_is_not_stored() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]], device=devices.current())
    cache = FlashCoreCache(CONFIG, max_cache_len=4)
    key, value = feed(cache, 4, mask)

    assert cache.layers[0].kv.seq_lens.tolist() == [2, 3, 0]
    assert cache.get_seq_length() == 4
    assert same(held(cache, 0), (key[0, :, 2:], value[0, :, 2:]))
    assert same(held(cache, 1), (key[1, :, :3], value[1, :, :3]))


def padded_cache() -> Any:
    """Three rows of 2, 3 and 4 real tokens in five columns."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]], device=devices.current())
    cache = FlashCoreCache(CONFIG, max_cache_len=24)
    feed(cache, 4, mask)
    feed(cache, 1, torch.cat([mask, mask.new_tensor([[0], [0], [1]])], 1))
    return cache


def test_cropping_forgets_columns_and_copies_nothing() -> None:
    cache = padded_cache()
    before = [held(cache, row) for row in range(3)]
    addresses = [buffer.data_ptr() for layer in cache.layers for buffer in layer.kv]
    cache.crop(-2)

    assert cache.layers[0].kv.seq_lens.tolist() == [1, 3, 3]
    assert cache.get_seq_length() == 3
    assert [buffer.data_ptr() for layer in cache.layers for buffer in layer.kv] == addresses
    for row, count in enumerate([1, 3, 3]):
        assert same(held(cache, row), (before[row][0][:, :count], before[row][1][:, :count]))


def test_beams_move_rows_within_the_buffers() -> None:
    cache = padded_cache()
    before = [held(cache, row) for row in range(3)]
    addresses = [buffer.data_ptr() for layer in cache.layers for buffer in layer.kv]
    cache.reorder_cache(torch.tensor([2, 0, 2]))

    assert [buffer.data_ptr() for layer in cache.layers for buffer in layer.kv] == addresses
    assert all(same(held(cache, row), before[old]) for row, old in enumerate([2, 0, 2]))
    assert cache.layers[1].real.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0, 0])), [1, 1, 0, 0]),
    ],
    ids=["repeat", "select", "mask", "expand"],
)
def test_the_batch_may_change(change: Any, rows: list[int]) -> None:
    cache = padded_cache()
    before = [held(cache, row) for row in range(3)]
    change(cache)

    assert cache.batch_size == len(rows)
    assert all(same(held(cache, row), before[old]) for row, old in enumerate(rows))
    mask = torch.cat([cache.layers[0].real, torch.ones(len(rows), 1, dtype=torch.bool)], 1)
    key, _ = feed(cache, 1, mask, rows=len(rows))
    assert torch.equal(held(cache, 0)[0][:, -1:], key[0])


def test_a_copy_is_continued_apart() -> None:
    cache = padded_cache()
    before = held(cache, 2)
    copied = copy.deepcopy(cache)
    mask = torch.cat([cache.layers[0].real, torch.ones(3, 1, dtype=torch.bool)], 1)
    feed(copied, 1, mask)

    assert (cache.get_seq_length(), copied.get_seq_length()) == (5, 6)
    assert same(held(cache, 2), before)
    assert same((held(copied, 2)[0][:, :-1], held(copied, 2)[1][:, :-1]), before)


def test_after_a_reset_it_is_empty_and_anybodys() -> None:
    cache = padded_cache()
    cache.reset()

    assert cache.get_seq_length() == 0
    assert cache.layers[0].kv.seq_lens.tolist() == [0, 0, 0]
    flash, _ = tiny_llamas.pair(CONFIG)
    with torch.no_grad():
        flash(tiny_llamas.tokens(3, 2), past_key_values=cache)
    assert cache.get_seq_length() == 2


def test_early_initialisation_allocates_once() -> None:
    cache = FlashCoreCache(CONFIG, max_cache_len=24)
    cache.early_initialization(3, 2, 16, torch.float32, devices.current())
    addresses = [buffer.data_ptr() for layer in cache.layers for buffer in layer.kv]
    feed(cache, 5)

    assert [buffer.data_ptr() for layer in cache.layers for buffer in layer.kv] == addresses

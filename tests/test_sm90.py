"""When calls have the kernels for Hopper, which no interpreter runs: ``tests/test_compiles.py`` compiles them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

import flashcore
from flashcore.fast import relaunch, tuning
from tests.tensors import DEVICE


@pytest.fixture(autouse=True)
def _as_with_triton_3_6(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    tuning.has_sm90_kernels.cache_clear()
    yield
    tuning.has_sm90_kernels.cache_clear()


def plan(q_len: int = 512, head_dim: int = 128, dtype: torch.dtype = torch.float16, arch: int = 90, **more: int) -> str:
    """Which kernel and which tile of rows."""
    arguments = {"group_size": 2, **more}
    chosen = tuning.plan(q_len=q_len, head_dim=head_dim, dtype=dtype, arch=arch, **arguments)
    return f"{chosen.path} {chosen.block_m}"


def decode(head_dim: int = 128, group_size: int = 1) -> tuning.LaunchPlan:
    """The plan of a decode step."""
    return tuning.plan(q_len=1, group_size=group_size, head_dim=head_dim, dtype=torch.float16, arch=90)


@pytest.mark.parametrize(("head_dim", "long"), [(64, 8192), (128, 4096)])
def test_prompts_have_it_and_long_ones_larger_tiles(head_dim: int, long: int) -> None:
    assert [plan(q_len, head_dim) for q_len in (16, 17, long - 1, long)] == [
        "split 32", "prefill_sm90 64", "prefill_sm90 64", "prefill_sm90 128",
    ]  # fmt: skip
    assert plan(head_dim=head_dim, dtype=torch.bfloat16) == "prefill_sm90 64"


@pytest.mark.parametrize(
    "other",
    [
        {"arch": 80}, {"arch": 100}, {"head_dim": 32}, {"head_dim": 120}, {"dtype": torch.float32}, {"block_m": 64},
        {"block_n": 64},
    ],
)  # fmt: skip
def test_other_calls_have_the_portable_kernel(other: dict[str, Any]) -> None:
    assert plan(**other).startswith("prefill ")


def test_it_can_be_forced_and_so_can_the_others() -> None:
    with tuning.forced(path="prefill_sm90", block_m=128):
        assert [plan(q_len) for q_len in (1, 512)] == ["prefill_sm90 128"] * 2
        assert plan(head_dim=32) == "prefill 128"
    with tuning.forced(path="prefill"):
        assert plan() == "prefill 64"
    with tuning.forced(block_n=32):
        assert plan(q_len=2048) == "prefill 64"


def test_another_triton_has_the_portable_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.7.0")

    assert [plan(), plan(1)] == ["prefill 64", "split 16"]


def test_it_has_no_splits() -> None:
    chosen = tuning.plan(q_len=512, group_size=1, head_dim=128, dtype=torch.float16, arch=90)

    assert (chosen.grid_splits(10_000), chosen.split_size(10_000), chosen.num_splits(10_000)) == (1, None, 1)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_decode_steps_have_a_kernel_of_as_many_columns_as_there_are_heads(head_dim: int) -> None:
    assert [plan(1, head_dim, group_size=heads) for heads in (1, 8, 9, 16, 17)] == [
        "split_sm90 8", "split_sm90 8", "split_sm90 16", "split_sm90 16", "split 32",
    ]  # fmt: skip
    assert plan(1, head_dim, torch.bfloat16) == "split_sm90 8"
    assert plan(2, head_dim) == "split 16"


@pytest.mark.parametrize(
    "other",
    [
        {"arch": 80}, {"arch": 100}, {"head_dim": 32}, {"head_dim": 120}, {"dtype": torch.float32}, {"block_m": 16},
        {"block_n": 64},
    ],
)  # fmt: skip
def test_other_decode_steps_have_the_portable_kernel(other: dict[str, Any]) -> None:
    assert plan(1, **other).startswith("split ")


def test_the_decode_kernel_can_be_forced_and_so_can_the_other() -> None:
    with tuning.forced(path="split_sm90", kv_split_size=100 * 16):
        assert [plan(1), plan(1, head_dim=32), plan(64)] == ["split_sm90 8", "split 16", "prefill 64"]
        assert plan(1, block_n=16) == "split_sm90 8"
        assert decode().kv_split_size == 25 * 64
    with tuning.forced(path="split"):
        assert plan(1) == "split 16"
    with tuning.forced(block_n=32):
        assert plan(1) == "split 16"


def test_splits_of_a_decode_step_are_64_kilobytes_up_to_8_of_them() -> None:
    chosen = decode()
    tiles = 64  # keys

    assert [chosen.num_splits(tiles * n) for n in (0, 1, 4, 5, 6, 16, 17, 64)] == [1, 1, 1, 3, 3, 8, 6, 8]
    assert [chosen.split_size(tiles * n) for n in (4, 5, 16, 17, 64)] == [tiles * n for n in (4, 2, 2, 3, 8)]
    assert [chosen.num_splits(n) for n in (4096, 4097, 16384, 65536)] == [8, 9, 16, 32]


@pytest.mark.parametrize(
    ("rows", "longest", "is_even", "splits"),
    [
        (8, 4096, True, 1), (128, 4096, True, 8), (64, 8192, True, 4), (64, 512, True, 4), (24, 1024, True, 1),
        (128, 4096, False, 1), (512, 4096, False, 4),
    ],
)  # fmt: skip
def test_a_program_takes_what_it_reads_as_fast_as_the_memory(
    rows: int, longest: int, is_even: bool, splits: int
) -> None:
    """Of an H200."""
    gpu = tuning.Gpu(132, 4800.0)

    assert decode().share_out(rows, longest, longest, is_even=is_even, gpu=gpu) == (splits, False)


def test_an_unknown_memory_is_taken_for_that_of_an_h100() -> None:
    def shared_out(memory_gb_s: float) -> list[int]:
        gpu = tuning.Gpu(132, memory_gb_s)
        return [decode().share_out(rows, 4096, 4096, is_even=True, gpu=gpu)[0] for rows in range(1, 140)]

    assert shared_out(0.0) == shared_out(3350.0) != shared_out(2000.0)


def test_batch_rows_and_heads_have_dimensions_of_the_grid_where_these_are_large_enough() -> None:
    assert decode().grid(5, 8, 65535, 1) == (5, 8, 65535)
    assert decode().grid(5, 8, 65536, 1) == (5 * 8 * 65536, 1, 1)
    assert decode(head_dim=48).grid(5, 8, 3, 2) == (5 * 8 * 3, 2, 1)


def test_the_place_of_a_split_is_guessed_only_where_all_rows_have_the_same() -> None:
    chosen = decode()

    assert chosen.likely_split_size(1000, 1000, is_even=True, shortest=1000) == chosen.split_size(1000)
    assert chosen.likely_split_size(1000, 1000, is_even=True, shortest=897) == chosen.split_size(897)
    assert chosen.likely_split_size(1000, 1000, is_even=True, shortest=896) == 0
    assert chosen.likely_split_size(1000, 16000, is_even=True, shortest=1000) == 0
    assert chosen.likely_split_size(1000, 1000, is_even=False, shortest=1000) == -1


@pytest.mark.parametrize(("forced", "splits"), [(1, 1), (4, 4), (1 << 20, 8)])
def test_how_many_splits_a_program_takes_can_be_forced(forced: int, splits: int) -> None:
    with tuning.forced(splits_per_program=forced):
        chosen = decode()
        assert chosen.share_out(512, 4096, 4096, is_even=True, gpu=tuning.Gpu(132, 4800.0)) == (splits, False)
        assert chosen.share_out(512, 64, 64, is_even=True, gpu=tuning.Gpu(132, 4800.0)) == (1, False)


def test_a_repeated_launch_guesses_anew_when_the_shortest_row_has_other_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "gpu", lambda _: tuning.Gpu(132, 4800.0))
    again = relaunch.Relaunch(
        SimpleNamespace(arg_names=list(relaunch.SHARED_OUT)), None, [], {}, decode(),
        flashcore.KVCache.allocate(2, 4, 2000, 128, torch.float16, DEVICE), torch.empty(2, 4, 1, 128), 2000, False,
        (False, False, False),
    )  # fmt: skip

    def likely(longest: int, shortest: int) -> int:
        past: Any = SimpleNamespace(max_len=longest, min_len=shortest, is_even=True)
        assert again.is_for(past)
        return again.shares.arguments[relaunch.SHARED_OUT.index("likely_split_size")]

    assert [likely(1000, 1000), likely(1000, 800), likely(1001, 990), likely(1500, 1500)] == [128, 0, 128, 192]

"""When a call has the prefill kernel for Hopper, which no interpreter runs: ``tests/test_compiles.py`` compiles it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton

from flashcore.fast import tuning


@pytest.fixture(autouse=True)
def _as_with_triton_3_6(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    tuning.has_sm90_prefill.cache_clear()
    yield
    tuning.has_sm90_prefill.cache_clear()


def plan(q_len: int = 512, head_dim: int = 128, dtype: torch.dtype = torch.float16, arch: int = 90, **tile: int) -> str:
    """Which kernel and which tile of rows."""
    chosen = tuning.plan(q_len=q_len, group_size=2, head_dim=head_dim, dtype=dtype, arch=arch, **tile)
    return f"{chosen.path} {chosen.block_m}"


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

    assert plan() == "prefill 64"


def test_it_has_no_splits() -> None:
    chosen = tuning.plan(q_len=512, group_size=1, head_dim=128, dtype=torch.float16, arch=90)

    assert (chosen.grid_splits(10_000), chosen.split_size(10_000), chosen.num_splits(10_000)) == (1, None, 1)

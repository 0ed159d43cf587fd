"""Every branch of the way from a call to its kernels is taken by drawn cases: no law can judge one that is not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from flashcore import KVCache
from flashcore.fast import attention_production
from flashcore.fast.relaunch import Relaunch
from properties.case import Case
from properties.runner import run
from properties.strategies import cases

FLAGS = ("MASK_D", "CAUSAL", "APPEND", "HAS_SEQ_LENS", "HAS_NEW_LENS")
BRANCHES = {
    *(f"{path}, {flag}={value}" for path in ("prefill", "split") for flag in FLAGS for value in (False, True)),
    *(f"split, NEW_AHEAD={value}" for value in (False, True)),
    *(f"split, splits {count}" for count in ("1", "2", "3 or more")),
    *(f"{path}, row tiles {count}" for path in ("prefill", "split") for count in ("1", "several")),
    "append alone",
    "repeated launch",
    "launch repeated in another number of splits",
}


class Spy:
    """Stands in for a kernel: notes how it is launched and computes nothing."""

    def __init__(self, path: str, seen: set[str], arg_names: list[str]) -> None:
        self.path, self.seen, self.arg_names = path, seen, arg_names

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            if self.path == "append":
                self.seen.add("append alone")
                arguments[0].zero_()
                return
            constants |= {n: a for n, a in zip(self.arg_names, arguments, strict=False) if n.isupper()}
            flags = [*FLAGS, "NEW_AHEAD"] if self.path == "split" else FLAGS
            self.seen.update(f"{self.path}, {flag}={bool(constants[flag])}" for flag in flags)
            numbers = [argument for argument in arguments if not isinstance(argument, torch.Tensor)]
            # qk_scale, then the sizes in the order of the kernel's signature
            num_kv_heads, row_tiles = numbers[5], numbers[9]
            self.seen.add(f"{self.path}, row tiles {'1' if row_tiles == 1 else 'several'}")
            if self.path == "split":
                splits = numbers[10]
                assert grid[0] % (splits * row_tiles * num_kv_heads) == 0
                self.seen.add(f"split, splits {('1', '2', '3 or more')[min(splits, 3) - 1]}")
            arguments[2].zero_() if arguments[2].dtype == torch.int32 else None

        return launch


def test_every_branch_of_the_dispatch_is_taken_by_one_case_in_200(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: Counter[str] = Counter()
    seen: set[str] = set()
    for path, name in (
        ("prefill", "prefill_attention"),
        ("split", "split_kv_attention"),
        ("append", "append_new_tokens"),
    ):
        kernel = getattr(attention_production, name)
        monkeypatch.setattr(attention_production, name, Spy(path, seen, kernel.arg_names))

    repeat = Relaunch.__call__

    def repeated(self: Relaunch, past: KVCache, *new: torch.Tensor) -> Any:
        result = repeat(self, past, *new)
        if result is not None:
            seen.add("repeated launch")
            assert past.max_len is not None
            if self.plan.num_splits(past.max_len) != self.arguments[self.index["grid_splits"]]:
                seen.add("launch repeated in another number of splits")
        return result

    monkeypatch.setattr(Relaunch, "__call__", repeated)

    @settings(max_examples=1000, database=None, deadline=None, derandomize=True)
    @given(cases(size="small"))
    def count(case: Case) -> None:
        seen.clear()
        run(case)
        taken.update(seen)

    count()

    assert taken.keys() <= BRANCHES
    assert {branch: taken[branch] for branch in BRANCHES if taken[branch] * 200 < 1000} == {}

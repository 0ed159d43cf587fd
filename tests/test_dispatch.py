"""Every branch of the way from a call to its kernels is taken by drawn cases: no law can judge one that is not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from flashcore import KVCache
from flashcore.fast import attention_production
from flashcore.fast.kernels import primitives
from flashcore.fast.relaunch import Relaunch
from properties.case import Case
from properties.runner import run
from properties.strategies import cases

FLAGS = {
    name: getattr(primitives, name)
    for name in ("HAS_SEQ_LENS", "HAS_NEW_LENS", "APPEND", "LONG_SEQ_LENS", "LONG_NEW_LENS")
}
CONSTANTS = ("MASK_D",)
PATHS = ("prefill", "split")
BRANCHES = {
    *(
        f"{path}, {flag}={value}"
        for path in ("prefill", "split")
        for flag in (*CONSTANTS, *FLAGS)
        for value in (False, True)
    ),
    *(f"split, ONE_QUERY={value}" for value in (False, True)),
    *(f"split, splits {count}" for count in ("1", "2", "3 or more")),
    *(f"{path}, row tiles {count}" for path in PATHS for count in ("1", "several")),
    "append alone",
    "repeated launch",
    "launch repeated in another number of splits",
}


class Spy:
    """Stands in for a kernel: notes how it is launched and computes nothing."""

    def __init__(self, path: str, seen: set[str], arg_names: list[str]) -> None:
        self.path, self.seen, self.arg_names = path, seen, arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            if self.path == "append":
                self.seen.add("append alone")
                arguments[0].zero_()
                return
            given = constants | dict(zip(self.arg_names, arguments, strict=False))
            assert given["seq_lens_ptr"].dtype == given["new_lens_ptr"].dtype == torch.int32  # else a kernel more each
            constexprs = [*CONSTANTS, "ONE_QUERY"] if self.path == "split" else CONSTANTS
            self.seen.update(f"{self.path}, {name}={bool(given[name])}" for name in constexprs)
            self.seen.update(f"{self.path}, {name}={bool(given['flags'] & bit.value)}" for name, bit in FLAGS.items())
            if self.path == "split":
                splits, row_tiles = given["grid_splits"], grid[1]
                assert grid[0] % (splits * given["num_kv_heads"]) == 0
                self.seen.add(f"split, splits {('1', '2', '3 or more')[min(splits, 3) - 1]}")
            else:
                row_tiles = given["row_tiles"]
            self.seen.add(f"{self.path}, row tiles {'1' if row_tiles == 1 else 'several'}")
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

    repeat = Relaunch.again

    def repeated(self: Relaunch, past: KVCache, *new: torch.Tensor) -> Any:
        result = repeat(self, past, *new)
        if result is not None:
            seen.add("repeated launch")
            assert past.max_len is not None
            if self.plan.grid_splits(past.max_len) != self.arguments[self.kernel.arg_names.index("grid_splits")]:
                seen.add("launch repeated in another number of splits")
        return result

    monkeypatch.setattr(Relaunch, "again", repeated)

    @settings(max_examples=1000, database=None, deadline=None, derandomize=True)
    @given(cases(size="small"))
    def count(case: Case) -> None:
        seen.clear()
        run(case)
        taken.update(seen)

    count()

    assert taken.keys() <= BRANCHES
    assert {branch: taken[branch] for branch in BRANCHES if taken[branch] * 200 < 1000} == {}

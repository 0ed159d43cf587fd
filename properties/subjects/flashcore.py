"""flashcore itself, and what its tuning says about the tiles of a call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from unittest.mock import patch

import torch

import flashcore
from flashcore.fast import attention_production, buffers, tuning
from properties.case import Case
from properties.device import current
from properties.subjects import DEFAULT, Subject
from references.arithmetic_model import AMPERE, BLACKWELL, HOPPER, INTERPRETER, ArithmeticModel
from references.tiling import Tiles, tiling

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def forced(case: Case) -> AbstractContextManager[None]:
    """Force the case's split size; its tiles are arguments of the call."""
    return tuning.forced(kv_split_size=case.kv_split_size)


def on_path(path: tuning.Path, case: Case) -> AbstractContextManager[None]:
    """Force the case's split size, and a kernel where the call fits it."""
    return tuning.forced(path=path, kv_split_size=case.kv_split_size)


def in_few_splits(case: Case) -> AbstractContextManager[None]:
    """Force the split kernel, and splits that grow rather than become more than three."""
    return tuning.forced(path="split", kv_split_size=case.kv_split_size, max_splits=3)


def in_longer_splits(case: Case) -> AbstractContextManager[None]:
    """Force the split kernel, and that a single split becomes longer before there are two, and these before more."""
    return tuning.forced(path="split", kv_split_size=case.kv_split_size or 16, few_splits=1)


def crowded(case: Case) -> AbstractContextManager[None]:
    """Force the split kernel, and that for many programs where each has one split."""
    return tuning.forced(path="split", kv_split_size=case.kv_split_size, crowded=True)


def on_hopper(block_m: int, case: Case) -> AbstractContextManager[None]:
    """Force the kernel for Hopper, in tiles of so many rows, on what it takes; the other prefill kernel on the rest."""
    if case.head_dim not in tuning.SM90_TILES or case.dtype == "float32":
        return on_path("prefill", case)
    return tuning.forced(path="prefill_sm90", block_m=block_m)


def on_hopper_split(
    case: Case, max_splits: int | None = None, few_splits: int | None = None, splits_per_program: int | None = None
) -> AbstractContextManager[None]:
    """Force the decode kernel for Hopper on what it takes; the rest has the kernel that it has anyway."""
    return tuning.forced(
        path="split_sm90", kv_split_size=case.kv_split_size or 64, max_splits=max_splits, few_splits=few_splits,
        splits_per_program=splits_per_program,
    )  # fmt: skip


def unsplit(_: Case) -> AbstractContextManager[None]:
    """Force one split a row, of whatever length."""
    return tuning.forced(max_splits=1)


def unseen() -> AbstractContextManager[object]:
    """Plan calls as those that a CUDA graph records: no length is looked at on the host."""
    return patch.object(attention_production, "_is_capturing", return_value=True)


def tiles(case: Case, q_len: int, cached: int, new: int) -> Tiles:
    """The tiles of one row, as the launch plan cuts them; call inside ``forced``."""
    plan = tuning.plan(
        q_len=q_len,
        group_size=case.group_size,
        head_dim=case.head_dim,
        dtype=_DTYPES[case.dtype],
        block_m=case.block_m,
        block_n=case.block_n,
        # Where there is no GPU, nobody need have chosen a device.
        arch=_architecture(current() if torch.cuda.is_available() else "cpu"),
    )
    if case.op == "attention" and case.is_causal:
        # The last keys, as many as there are queries, are treated like new tokens.
        new = min(q_len, cached)
        cached -= new
    if plan.path not in tuning.SPLIT_PATHS or new == 0:
        return tiling(cached, new, plan.block_n)
    # The split path folds all new tokens in one tile: a single one before the first split's cached tokens, several
    # after the last split's.
    splits = tiling(cached, 0, plan.block_n, plan.split_size(cached))
    if plan.path == "split_sm90":
        # There the new token has its place in the last tile of the last split, or a tile of its own where that is full.
        start = splits[-1][0][0] if cached else 0
        last = tiling(cached + new - start, 0, plan.block_n)[0]
        return (*splits[:-1], tuple((start + a, start + b) for a, b in last))
    if plan.one_query:
        return (((cached, cached + new), *splits[0]), *splits[1:])
    return (*splits[:-1], (*splits[-1], (cached, cached + new)))


def _architecture(device: str) -> int:
    return tuning.architecture(torch.device(device))


def model(device: str) -> ArithmeticModel:
    """The arithmetic of the device's tensor cores, or of the interpreter."""
    if device == "cpu":
        return INTERPRETER
    major, _ = torch.cuda.get_device_capability()
    return {8: AMPERE, 9: HOPPER}.get(major, BLACKWELL)


def subject() -> Subject:
    """The shipped kernels."""
    hopper: dict[str, Callable[[Case], AbstractContextManager[None]]] = {
        **{f"prefill_sm90 {rows}": partial(on_hopper, rows) for tiles in tuning.SM90_TILES.values() for rows in tiles},
        "split_sm90": partial(on_hopper_split, splits_per_program=1),
        "split_sm90, groups": partial(on_hopper_split, splits_per_program=tuning.SPLIT_GROUP),
        "split_sm90, whole rows": partial(on_hopper_split, splits_per_program=1 << 20),
        "split_sm90, few splits": partial(on_hopper_split, max_splits=3),
        "split_sm90, longer splits": partial(on_hopper_split, few_splits=1),
    }
    return Subject(
        spec=DEFAULT,
        attention_with_kv_cache=flashcore.attention_with_kv_cache,
        attention=flashcore.attention,
        make_cache=flashcore.KVCache,
        overflow_error=flashcore.CacheOverflowError,
        allocators=(buffers,),
        forced=forced,
        tiles=tiles,
        model=model,
        checks_arguments=True,
        unseen=unseen,
        paths={
            "prefill": partial(on_path, "prefill"),
            "split": partial(on_path, "split"),
            "few splits": in_few_splits,
            "longer splits": in_longer_splits,
            "crowded": crowded,
            **(hopper if torch.cuda.is_available() and tuning.has_sm90_kernels(_architecture("cuda")) else {}),
        },
        unsplit=unsplit,
    )

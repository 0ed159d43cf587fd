"""Splits of the cached keys: the host launches as many as any row of the batch may need."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
import triton
from hypothesis import given, settings
from torch import Tensor

import flashcore
from flashcore.fast import attention_production, relaunch, tuning
from properties.case import Case
from properties.schedule import Outline, outline
from properties.strategies import cases
from references.tiling import MERGE_GROUP
from tests.splits_kernel import splits_of_rows
from tests.tensors import DEVICE, normal

LENGTHS = range(1, 400)


def test_the_error_bound_counts_the_groups_that_the_kernels_merge() -> None:
    assert tuning.SPLIT_GROUP == MERGE_GROUP


def plans() -> list[tuning.LaunchPlan]:
    """As chosen, and as forced, with splits that have to grow."""
    made = [tuning.plan(q_len=1, group_size=1, head_dim=64, dtype=torch.float16)]
    made.append(dataclasses.replace(made[0], path="split_sm90", kv_split_size=256, unsplit_size=512))
    for kv_split_size, max_splits in ((16, None), (16, 4), (48, 3), (32, 1)):
        with tuning.forced(block_n=16, kv_split_size=kv_split_size, max_splits=max_splits):
            made.append(tuning.plan(q_len=1, group_size=1, head_dim=64, dtype=torch.float16))
    return made


@pytest.mark.parametrize("plan", plans(), ids=lambda plan: f"{plan.kv_split_size} x {plan.max_splits}")
def test_no_row_needs_more_splits_than_are_launched_for_a_longer_one(plan: tuning.LaunchPlan) -> None:
    step = max(1, plan.kv_split_size // 100)
    launched = [plan.grid_splits(step * n) for n in LENGTHS]

    assert launched == sorted(launched)
    assert all(plan.num_splits(step * n) <= grid for n, grid in zip(LENGTHS, launched, strict=True))
    assert launched[-1] <= plan.max_splits


def test_the_host_guesses_where_splits_begin_only_for_rows_that_are_alike() -> None:
    plan = tuning.plan(q_len=1, group_size=1, head_dim=64, dtype=torch.float16)
    with tuning.forced(path="prefill"):
        whole = tuning.plan(q_len=1, group_size=1, head_dim=64, dtype=torch.float16)

    assert plan.likely_split_size(1000, 1000, is_even=True) == plan.split_size(1000)
    assert plan.likely_split_size(1000, 1000, is_even=False) == 0
    assert plan.likely_split_size(None, 1000, is_even=True) == 0
    assert plan.likely_split_size(1000, 16000, is_even=True) == 0
    assert whole.likely_split_size(1000, 1000, is_even=True) == 0


@pytest.mark.parametrize(
    ("heads", "head_dim", "slots", "is_even", "on_h100", "on_h200"),
    [
        (128, 64, 512, True, 4, 4),
        (128, 64, 2048, True, 8, 4),
        (128, 64, 16384, True, 16, 4),
        (128, 128, 512, True, 8, 8),
        (128, 128, 2048, True, 8, 4),
        (144, 64, 16384, True, 16, 16),
        (512, 64, 16384, True, 16, 16),
        (24, 64, 4096, True, 1, 1),
        (24, 64, 16384, True, 1, 1),
        (32, 128, 8192, True, 4, 1),
        (64, 128, 1024, True, 4, 4),
        (64, 128, 8192, True, 4, 4),
        (128, 64, 4096, False, 1, 1),
        (512, 128, 4096, False, 1, 1),
    ],
)
def test_a_program_takes_no_more_than_it_can_read_as_fast_as_the_memory_gives(
    heads: int, head_dim: int, slots: int, is_even: bool, on_h100: int, on_h200: int
) -> None:
    plan = tuning.plan(q_len=1, group_size=1, head_dim=head_dim, dtype=torch.float16)

    taken = [
        plan.share_out(heads, slots, slots, is_even=is_even, gpu=tuning.Gpu(132, rate)).splits_per_program
        for rate in (3352, 4814)
    ]

    assert taken == [on_h100, on_h200]


@pytest.mark.parametrize(
    ("rows", "other", "crowded"),
    [
        (133, {}, True),
        (132, {}, False),
        (133, {"head_dim": 128}, True),
        (133, {"head_dim": 32}, False),
        (133, {"head_dim": 256}, False),
        (133, {"dtype": torch.float32}, False),
        (133, {"q_len": 2}, False),
    ],
)
def test_many_rows_that_are_not_split_are_crowded(rows: int, other: dict[str, Any], crowded: bool) -> None:
    """The compiler gives the programs of such steps fewer registers, so that more of them run at a time."""
    h100, h200 = tuning.Gpu(132, 3352), tuning.Gpu(132, 4814)
    plan = tuning.plan(**{"q_len": 1, "group_size": 1, "head_dim": 64, "dtype": torch.float16, **other})

    assert plan.share_out(rows, 16, 16, is_even=True, gpu=h100) == (1, crowded)
    assert plan.share_out(rows, 16, 16, is_even=False, gpu=h200) == (1, crowded)
    if crowded:
        assert plan.compiler_options(crowded=True) == {
            **plan.compiler_options(), "maxnreg": tuning.CROWDED_REGISTERS, "num_stages": tuning.CROWDED_STAGES,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "slots", "is_even", "other", "crowded"),
    [
        (24, 16384, True, {}, True),  # 384 splits
        (16, 16384, True, {}, False),  # 256: they fit, two on a multiprocessor
        (32, 16384, True, {}, True),
        (32, 16384, False, {}, False),  # few of those 512 are as long as the longest
        (66, 2048, False, {}, False),
        (67, 2048, False, {}, True),
        (67, 2048, False, {"group_size": 8}, True),
        (67, 2048, False, {"group_size": 8, "head_dim": 128}, True),
        (67, 2048, False, {"group_size": 16, "head_dim": 128}, False),  # merging them would spill
        (67, 2048, False, {"dtype": torch.float32}, False),
        (67, 2048, False, {"q_len": 2}, False),
    ],
)
def test_many_splits_are_crowded(rows: int, slots: int, is_even: bool, other: dict[str, Any], crowded: bool) -> None:
    plan = tuning.plan(**{"q_len": 1, "group_size": 1, "head_dim": 64, "dtype": torch.float16, **other})

    shares = plan.share_out(rows, slots, slots, is_even=is_even, gpu=tuning.Gpu(132, 4814))

    assert shares.is_crowded is crowded
    assert shares.splits_per_program == 1 or not crowded


@pytest.mark.parametrize(
    ("version", "arch", "crowded"),
    [("3.6.0", 80, True), ("3.6.0", 90, True), ("3.9.0", 80, True), ("3.9.0", 90, False)],
)
def test_no_step_is_crowded_where_the_assembler_would_spill(
    version: str, arch: int, crowded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    tuning.has_crowded_decode.cache_clear()
    try:
        plan = tuning.plan(q_len=1, group_size=1, head_dim=48, dtype=torch.float16, arch=arch)
        assert plan.share_out(133, 16, 16, is_even=True, gpu=tuning.Gpu(132, 0.0)) == (1, crowded)
    finally:
        tuning.has_crowded_decode.cache_clear()


def test_a_crowded_step_has_the_same_bits_and_another_kernel_follows_when_rows_are_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Steps that repeat a launch, and then one on the same buffers with a row that is long enough to be split."""
    new = [normal(3, 2, 1, 64, dtype=torch.float16, seed=step) for step in range(4)]
    key, value = (normal(3, 2, 1200, 64, dtype=torch.float16, seed=seed) for seed in (8, 9))
    launched: list[tuple[tuple[bool, ...], int]] = []
    share_out = relaunch.Relaunch._share_out

    def watched(self: relaunch.Relaunch, bound: int, shortest: int, is_even: bool) -> Any:
        shares = share_out(self, bound, shortest, is_even)
        launched.append((shares.kernel_kind, shares.arguments[0]))
        return shares

    monkeypatch.setattr(relaunch.Relaunch, "_share_out", watched)

    def outputs(multiprocessors: int) -> list[Tensor]:
        monkeypatch.setattr(tuning, "gpu", lambda _: tuning.Gpu(multiprocessors, 0.0))
        buffers = key.clone(), value.clone()
        cache = flashcore.KVCache(*buffers, lengths(20, 30, 40), max_len=40, min_len=20)
        found = []
        for token in new:
            if token is new[-1]:
                cache = flashcore.KVCache(*buffers, lengths(20, 30, 1100), max_len=1100, min_len=20, like=cache)
            result = flashcore.attention_with_kv_cache(token, token, token, cache, cache_max_len=1200)
            found.append(result[0])
            cache = cast(flashcore.KVCache, result[1])
        return found

    few, many = outputs(5), outputs(10_000)

    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=True))
    crowded, crowded_split, roomy = (False, True, True), (False, True, False), (False, False, False)
    assert launched == [(crowded, 1), (crowded_split, 8), (roomy, 1), (roomy, 8)]


def lengths(*of_rows: int) -> Tensor:
    """As a cache holds them."""
    return torch.tensor(of_rows, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("multiprocessors", [5, 17])
def test_how_many_splits_a_program_takes_changes_no_bit(multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of few multiprocessors gets groups of splits and whole rows where a large one gets a split a program."""
    lengths = (600, 0, 64, 16, 97)
    key, value = (normal(5, 2, 610, 16, dtype=torch.float32, seed=i) for i in (1, 2))
    query = normal(5, 4, 1, 16, dtype=torch.float32, seed=3)
    new_key, new_value = (normal(5, 2, 1, 16, dtype=torch.float32, seed=i) for i in (4, 5))
    taken = []

    def decode(rows: int, multiprocessors: int) -> tuple[Any, ...]:
        monkeypatch.setattr(tuning, "gpu", lambda _: tuning.Gpu(multiprocessors, 0.0))
        lens = torch.tensor(lengths[:rows], dtype=torch.int32, device=DEVICE)
        plan = tuning.plan(q_len=1, group_size=2, head_dim=16, dtype=torch.float32, block_n=16)
        bound = max(lengths[:rows])
        share = plan.share_out(2 * rows, bound, bound, is_even=rows == 1, gpu=tuning.Gpu(multiprocessors, 0.0))
        taken.append(min(share.splits_per_program, 5))
        result = flashcore.attention_with_kv_cache(
            query[:rows], new_key[:rows], new_value[:rows], (key[:rows].clone(), value[:rows].clone()), seq_lens=lens,
            cache_max_len=610, block_n=16, is_causal=True, return_lse=True,
        )  # fmt: skip
        return result[0], *result[2:]

    with tuning.forced(path="split", kv_split_size=16):
        for rows in (1, 5):
            one_each = decode(rows, 10_000)
            assert all(torch.equal(a, b) for a, b in zip(decode(rows, multiprocessors), one_each, strict=True))
    assert set(taken) == ({1, 4, 5} if multiprocessors == 5 else {1, 4})


@pytest.mark.parametrize("lengths", [(64, 65), (60, 65), (65, 64, 1, 0), (128, 129)])
def test_rows_whose_splits_grew_stand_beside_rows_whose_did_not(lengths: tuple[int, ...]) -> None:
    """With 65 slots three splits of 32 do, where 64 slots need four of 16."""
    batch = len(lengths)
    key, value = (normal(batch, 1, 130, 16, dtype=torch.float32, seed=i) for i in (1, 2))
    query, new_key, new_value = (normal(batch, 1, 1, 16, dtype=torch.float32, seed=i) for i in (3, 4, 5))

    def decode(rows: slice) -> torch.Tensor:
        lens = torch.tensor(lengths[rows], dtype=torch.int32, device=DEVICE)
        cache = (key[rows].clone(), value[rows].clone())
        with tuning.forced(path="split", block_n=16, kv_split_size=16, max_splits=4):
            return flashcore.attention_with_kv_cache(
                query[rows], new_key[rows], new_value[rows], cache, seq_lens=lens, cache_max_len=130
            )[0]

    together = decode(slice(None))

    for b in range(batch):
        assert torch.equal(together[b : b + 1], decode(slice(b, b + 1)))


def test_a_step_is_repeated_again_once_another_kernel_has_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the fifth split on a program takes four here: the first step then goes the ordinary way, and no other."""
    monkeypatch.setattr(tuning, "gpu", lambda _: tuning.Gpu(5, 0.0))
    prepared: list[int] = []
    launch = attention_production._launch_attention

    def counted(*arguments: Any) -> None:
        prepared.append(len(prepared))
        launch(*arguments)

    monkeypatch.setattr(attention_production, "_launch_attention", counted)
    cache: Any = flashcore.KVCache.allocate(2, 1, 96, 16, torch.float32, DEVICE)
    query, key, value = (normal(2, 1, 1, 16, dtype=torch.float32, seed=i) for i in range(3))
    ordinary = []
    with tuning.forced(kv_split_size=16, block_n=16):
        for _ in range(90):
            _, cache = flashcore.attention_with_kv_cache(query, key, value, cache, cache_max_len=96)[:2]
            ordinary.append(len(prepared))

    assert ordinary[:65] == [1] * 65
    assert ordinary[65:] == [2] * 25


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("multiprocessors", [4, 10_000])
def test_a_zero_has_the_same_sign_however_splits_are_shared_out(
    batch: int, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of -1 rescaled by zero are -0, and so is the new token's: merged with an empty split they would be +0."""
    monkeypatch.setattr(tuning, "gpu", lambda _: tuning.Gpu(multiprocessors, 0.0))
    slots = 6 * 16
    query, new_key, new_value = (torch.full((batch, 1, 1, 16), x, device=DEVICE) for x in (1.0, 200.0, -0.0))
    key, value = (torch.full((batch, 1, slots + 1, 16), x, device=DEVICE) for x in (0.0, -1.0))

    with tuning.forced(path="split", kv_split_size=16):
        out = flashcore.attention_with_kv_cache(
            query, new_key, new_value, (key, value), seq_lens=torch.full((batch,), slots, device=DEVICE),
            cache_max_len=slots + 1, block_n=16, scale=1.0,
        )[0]  # fmt: skip

    assert torch.equal(out.view(torch.int32), torch.zeros_like(out).view(torch.int32))


@pytest.mark.parametrize("plan", plans(), ids=lambda plan: f"{plan.kv_split_size} x {plan.max_splits}")
def test_host_and_device_split_a_row_alike(plan: tuning.LaunchPlan) -> None:
    """At every edge where splits become longer or more, up to splits of more than eight times the shortest."""
    edges = [plan.kv_split_size * n for n in (*range(1, 34), 64, 128, 136, 192, 512, 513, 600)]
    lengths = sorted({0, 1, *(edge + off for edge in edges for off in (-1, 0, 1))})
    given = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    out = torch.empty(len(lengths), 2, dtype=torch.int32, device=DEVICE)
    splits_of_rows[(1,)](
        given,
        out,
        plan.unsplit_size,
        plan.kv_split_size,
        plan.few_splits,
        plan.max_splits,
        len(lengths),
        *plan.long_splits,
        BLOCK_N=plan.block_n,
    )

    assert out.tolist() == [[plan.num_splits(n), plan.split_size(n)] for n in lengths]


def test_drawn_decode_steps_are_shared_out_in_every_way() -> None:
    """Of rows with more splits than are merged in one group, even and uneven: one case in 200 each."""
    found: Counter[str] = Counter()

    @settings(max_examples=600, database=None, deadline=None, derandomize=True)
    @given(cases(size="small", ops=("attention_with_kv_cache",)))
    def count(case: Case) -> None:
        found.update({way for call in outline(case) if call.q_len == 1 and call.has_cache for way in ways(case, call)})

    def ways(case: Case, call: Outline) -> Iterator[str]:
        with tuning.forced(kv_split_size=case.kv_split_size):
            plan = tuning.plan(
                q_len=1, group_size=case.group_size, head_dim=case.head_dim, dtype=torch.float16, block_n=case.block_n
            )  # fmt: skip
        longest = max(call.seq_lens, default=0)
        if plan.path == "split" and plan.num_splits(longest) > tuning.SPLIT_GROUP:
            taken = plan.share_out(
                case.batch * case.num_kv_heads, longest, longest, is_even=True,
                gpu=tuning.gpu(torch.device("cpu")),
            ).splits_per_program  # fmt: skip
            way = {1: "a split", tuning.SPLIT_GROUP: "a group"}.get(taken, "a row")
            yield from (way, f"{way}, uneven")[: 1 + (len(set(call.seq_lens)) > 1)]

    count()

    expected = {f"{way}{rows}" for way in ("a split", "a group", "a row") for rows in ("", ", uneven")}
    assert {way for way, times in found.items() if times >= 3} == expected, found

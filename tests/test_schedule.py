"""What each call of a case is given, against schedules worked out by hand and the slot-by-slot oracle."""

from __future__ import annotations

import numpy as np
import pytest

from properties import variants
from properties.case import Case, Patch, Row, Step
from properties.schedule import digest, initial_cache, outline, plan
from references.rounding import decode
from tests.schedule_oracle import follow

RAGGED = Case(
    rows=(Row(cached=5, new=(2, 0, 1), uid=1), Row(cached=0, new=(1, 3, 1), uid=2)),
    steps=(Step(padding=1), Step(), Step()),
    num_kv_heads=2,
    group_size=2,
    head_dim=4,
    start="tuple",
    capacity=7,
    cache_max_len=8,
    values="normal",
)


def test_lengths_follow_the_rows() -> None:
    first, second, third = outline(RAGGED)

    assert (first.q_len, first.seq_lens, first.new_lens, first.kv_lens) == (3, (5, 0), (2, 1), (7, 1))
    assert (second.q_len, second.seq_lens, second.kv_lens) == (3, (7, 1), (7, 4))
    assert (third.q_len, third.seq_lens, third.kv_lens) == (1, (7, 4), (8, 5))
    assert [call.grows for call in (first, second, third)] == [False, False, True]
    assert [call.passes_seq_lens for call in (first, second, third)] == [True, False, False]


def test_overflow_names_the_first_row_and_changes_nothing() -> None:
    case = Case(rows=(Row(new=(1, 1, 1)), Row(new=(2, 9, 1))), steps=(Step(),) * 3, cache_max_len=4)
    first, second, third = outline(case)

    assert [call.overflow_row for call in (first, second, third)] == [None, 1, None]
    assert [call.stores for call in (first, second, third)] == [True, False, True]
    assert third.seq_lens == first.kv_lens == (1, 2)


@pytest.mark.parametrize(("limit", "overflows"), [(5, True), (6, False), (7, False)])
def test_overflow_begins_one_slot_past_the_limit(limit: int, overflows: bool) -> None:
    case = Case(rows=(Row(cached=5),), start="tuple", capacity=5, cache_max_len=limit)

    assert (outline(case)[0].overflow_row == 0) is overflows


def test_peek_stores_nothing_and_never_overflows() -> None:
    case = Case(rows=(Row(new=(3, 2)),), steps=(Step(update_cache=False), Step()), cache_max_len=2)
    peek, append = outline(case)

    assert (peek.overflow_row, peek.stores, peek.has_cache) == (None, False, False)
    assert (append.has_cache, append.seq_lens, append.stores) == (False, (0,), True)


def test_fork_goes_back_and_brings_other_tokens() -> None:
    steps = (Step(), Step(), Step(parent=1))
    case = Case(rows=(Row(new=(2, 1, 1)),), steps=steps, cache_max_len=9, values="normal")
    _, second, third = plan(case)

    assert third.seq_lens == second.seq_lens == (2,)
    assert not np.array_equal(third.key, second.key)
    assert third.branch == 1


def test_naming_the_newest_cache_is_no_fork() -> None:
    steps = (Step(), Step(update_cache=False), Step(parent=1))
    case = Case(rows=(Row(new=(2, 1, 1)),), steps=steps, cache_max_len=9, values="normal")

    assert digest(case) == digest(Case(rows=case.rows, steps=(*steps[:2], Step()), cache_max_len=9, values="normal"))


def test_rollback_shortens_every_row_and_stops_at_zero() -> None:
    case = Case(
        rows=(Row(cached=5), Row(cached=1)), steps=(Step(rollback=2),), start="kv_cache", capacity=9, values="normal"
    )
    (call,) = outline(case)

    assert call.seq_lens == (3, 0)
    assert call.passes_seq_lens
    assert call.branch == 1


def test_growth_is_known_for_the_given_buffers_only() -> None:
    steps = (Step(), Step(), Step(parent=0))
    case = Case(rows=(Row(cached=2, new=(1, 9, 1)),), steps=steps, start="kv_cache", capacity=2)

    assert [call.grows for call in outline(case)] == [True, False, True]


def test_attention_sees_its_keys_from_the_end() -> None:
    case = Case(rows=(Row(cached=5, new=(2,), uid=3),), op="attention", values="normal")
    (call,) = plan(case)
    whole = plan(Case(rows=(Row(new=(5,), uid=3),), cache_max_len=5, values="normal"))[0]

    assert (call.q_len, call.kv_lens, call.key.shape) == (2, (5,), (1, 1, 5, 16))
    assert np.array_equal(call.key, whole.key)
    assert np.array_equal(call.query, whole.query[:, :, 3:])


def test_initial_cache_holds_the_first_tokens_and_nothing_else() -> None:
    initial = initial_cache(RAGGED)
    assert initial is not None

    whole = plan(
        variants.as_single_prefill(Case(rows=(Row(new=(5,), uid=1),), num_kv_heads=2, head_dim=4, values="normal"))
    )[0]
    assert initial.key.shape == (2, 2, 7, 4)
    assert np.array_equal(initial.key[:1, :, :5], whole.key)
    assert not initial.key[0, :, 5:].any()
    assert not initial.value[1].any()


def test_partition_of_the_same_tokens_gives_the_same_data() -> None:
    single = variants.as_single_prefill(RAGGED)
    (whole,) = plan(single)

    for b, row in enumerate(RAGGED.rows):
        for cut in (variants.appends(RAGGED), variants.as_single_tokens(RAGGED)):
            for name in ("query", "key", "value"):
                parts = [getattr(step, name)[b, :, : step.new_lens[b]] for step in plan(cut)]
                assert np.array_equal(np.concatenate(parts, axis=1), getattr(whole, name)[b, :, : sum(row.new)])


def test_padding_is_what_lies_beyond_new_lens() -> None:
    first = plan(RAGGED)[0]

    assert first.is_padding.tolist() == [[False, False, True], [False, True, True]]


@pytest.mark.parametrize(
    "case",
    [
        RAGGED,
        Case(rows=(Row(new=(3, 4, 1)), Row(new=(1, 9, 1), uid=1)), steps=(Step(),) * 3, cache_max_len=8, values="iota"),
        Case(
            rows=(Row(cached=3, new=(2, 1, 2, 1)), Row(cached=1, new=(0, 2, 2, 3), uid=1)),
            steps=(Step(), Step(update_cache=False), Step(parent=0), Step(rollback=2, padding=2)),
            start="kv_cache",
            capacity=4,
            cache_max_len=20,
            values="iota",
        ),
    ],
)
def test_oracle_agrees_with_the_plan(case: Case) -> None:
    """The oracle overflows where the plan says so, and its caches have the lengths the plan goes on from."""
    follow(case)


def test_patch_is_set_wherever_its_token_goes() -> None:
    patches = (Patch("value", 1, 2, 1, 3, "nan"), Patch("key", 0, 4, 0, 0, (2.5).hex()))
    case = Case(**{**vars(RAGGED), "patches": patches})
    initial, (_, second, _) = initial_cache(case), plan(case)
    assert initial is not None

    # Row 1 holds one token when step 1 brings three more: token 2 is the second of them.
    assert np.argwhere(np.isnan(decode(second.value, "float32"))).tolist() == [[1, 1, 1, 3]]
    assert decode(initial.key, "float32")[0, 0, 4, 0] == 2.5


def test_alone_keeps_the_numbers_and_the_widths_of_a_row() -> None:
    for b in range(2):
        for mine, ours in zip(plan(variants.alone(RAGGED, b)), plan(RAGGED), strict=True):
            assert mine.q_len == ours.q_len
            assert np.array_equal(mine.query[0], ours.query[b])
            assert np.array_equal(mine.value[0], ours.value[b])


def test_permuted_rows_carry_their_patches() -> None:
    rows = (Row(uid=1), Row(uid=2), Row(uid=3))
    case = Case(rows=rows, patches=(Patch("value", 2, 0, 0, 3, "inf"),), cache_max_len=1)
    permuted = variants.permuted(case, (1, 2, 0))

    assert permuted.rows == (rows[1], rows[2], rows[0])
    assert permuted.patches[0].row == 1
    with pytest.raises(ValueError, match="order must be a permutation of 3 rows"):
        variants.permuted(case, (0, 0, 1))


def test_repeated_heads_hold_the_numbers_of_their_group() -> None:
    patches = (Patch("value", 1, 0, 1, 3, "inf"),)
    case = Case(**{**vars(RAGGED), "patches": patches})
    grouped, repeated = plan(case)[0], plan(variants.repeated_heads(case))[0]

    assert np.array_equal(np.repeat(grouped.key, 2, axis=1), repeated.key)
    assert np.array_equal(np.repeat(grouped.value, 2, axis=1), repeated.value)
    assert np.array_equal(grouped.query, repeated.query)


def test_digest_changes_with_every_kind_of_number() -> None:
    fields = vars(RAGGED)
    others: list[dict[str, object]] = [
        {},
        {"seed": 1},
        {"rows": (Row(cached=5, new=(2, 0, 1), uid=9), RAGGED.rows[1])},
        {"dtype": "float16"},
        {"values": "integers"},
        {"gain": 1},
        {"head_dim": 8},
        {"cache_max_len": 7},
        {"patches": (Patch("key", 0, 0, 0, 0, "nan"),)},
    ]

    assert len({digest(Case(**{**fields, **other})) for other in others}) == len(others)


def test_digest_ignores_what_is_no_data() -> None:
    assert digest(RAGGED) == digest(Case(**{**vars(RAGGED), "block_n": 16, "query_layout": "gapped"}))

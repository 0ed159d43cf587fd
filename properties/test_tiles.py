"""Tiles, splits and kernels are choices of speed: bits on the lattice, within the budget elsewhere."""

from __future__ import annotations

from hypothesis import given

from properties import device as devices
from properties import subjects
from properties.assertions import assert_close, assert_same_outputs
from properties.case import TILES, Case
from properties.checking import expected_outputs
from properties.exact import assert_exact
from properties.needs import asks
from properties.runner import run
from properties.strategies import cases
from properties.variants import decoding, on_the_lattice, one_call, with_tiles

WITH_CACHE = ("attention_with_kv_cache",)


def other_tiles(case: Case) -> list[Case]:
    """Other tiles, unsplit; and the smallest tiles, each a split of its own."""
    block_m, block_n = (TILES[(case.seed + shift) % 3] for shift in (0, 1))
    unsplit = with_tiles(case, block_m, block_n)
    return [unsplit] if case.op == "attention" else [unsplit, with_tiles(case, 16, 16, 16)]


@asks("declared arithmetic")
@given(case=cases(families=("lattice",), runs=3))
def test_the_exact_lattice_equals_integer_arithmetic(case: Case) -> None:
    made = run(on_the_lattice(case))

    assert_exact(made, made.subject.model(devices.current()).division_error)


@asks("declared arithmetic", "tiles")
@given(case=cases(families=("lattice",), runs=3))
def test_tiles_and_splits_change_no_bit_on_the_lattice(case: Case) -> None:
    case = on_the_lattice(case)
    outputs = run(case).outputs

    for other in other_tiles(case):
        assert_same_outputs(run(other).outputs, outputs, "other tiles and the drawn ones")


@asks("tiles")
@given(case=cases(several_splits=True, runs=2, ops=WITH_CACHE))
def test_tiles_and_splits_stay_within_the_budget(case: Case) -> None:
    outputs = expected_outputs(run(case))

    for other in other_tiles(case):
        for (one, allowed), (two, also) in zip(outputs, expected_outputs(run(other)), strict=True):
            assert_close(one, two, (allowed, also), "the drawn tiles and others")


@asks("declared arithmetic")
@given(case=cases(families=("lattice",), runs=3))
def test_every_kernel_gives_the_same_bits_on_the_lattice(case: Case) -> None:
    """One split equals the kernel without splits, and so do several."""
    case = on_the_lattice(case)
    outputs = run(case).outputs
    subject = subjects.active()

    for name, forced in subject.paths.items():
        other = run(case, subjects.forced_to(subject, forced)).outputs
        assert_same_outputs(other, outputs, f"the {name} kernel and the chosen one")


@asks("tiles")
@given(case=cases(max_steps=1, several_splits=True, runs=2, ops=WITH_CACHE))
def test_one_split_for_all_keys_equals_no_split(case: Case) -> None:
    case, tile = one_call(case), case.block_n or 16
    keys = max([1, *(row.cached for row in case.rows)])
    whole = with_tiles(case, case.block_m, tile, -(-keys // tile) * tile)
    subject = subjects.active()
    unsplit = run(with_tiles(case, case.block_m, tile), subjects.forced_to(subject, subject.unsplit))

    assert_same_outputs(run(whole).outputs, unsplit.outputs, "one split for all keys and no split")


@asks("declared arithmetic", "tiles")
@given(case=cases(min_rows=1, several_splits=True, families=("lattice",), runs=4, ops=WITH_CACHE, overflow=False))
def test_every_kernel_decodes_alike_over_several_splits_on_the_lattice(case: Case) -> None:
    """No split, one for each tile, as many as the kernel likes, or at most three: the same bits."""
    case = decoding(on_the_lattice(case))
    outputs = run(case).outputs
    subject = subjects.active()

    for name, forced in subject.paths.items():
        other = run(case, subjects.forced_to(subject, forced)).outputs
        assert_same_outputs(other, outputs, f"the {name} kernel and the chosen one")

"""A planted fault comes out as the case that a person would write by hand to show it."""

from __future__ import annotations

from pathlib import Path

import pytest

from properties.case import Case, Row
from properties.exploring import Assignment, Outcome
from properties.laws import select_names
from properties.mutants.catalogue import select
from properties.mutants.mutant import write_mutated
from properties.pool import Answer, Worker

# Never reached: shrinking ends by itself, so that the case does not depend on the speed of the machine.
SHRINK_SECONDS = 3600.0


@pytest.mark.parametrize(
    ("mutant", "law", "smallest"),
    [
        # One cached key: the tile's other 15 columns join the softmax.
        ("M01", "output_and_lse_lie_within", Case(rows=(Row(1),), start="tuple", capacity=2, cache_max_len=2)),
        # Two kv heads, two query heads each, and values that tell where they came from.
        (
            "M40",
            "output_and_lse_lie_within",
            Case(num_kv_heads=2, group_size=2, cache_max_len=1, values="iota"),
        ),
        # The second row is full, the first is not; there are as many slots as the tokens would need.
        (
            "W2",
            "overflow_is_all_or_nothing",
            Case(rows=(Row(), Row(1)), start="tuple", capacity=2, cache_max_len=1),
        ),
    ],
)
def test_the_exact_minimal_case_comes_out(mutant: str, law: str, smallest: Case, tmp_path: Path) -> None:
    write_mutated(select([mutant])[0], tmp_path)
    worker = Worker(tmp_path, 0, "flashcore", "auto", first_on_path=str(tmp_path))
    try:
        name = select_names(list(worker.ready().laws), law)[0]
        worker.give(Assignment(name, seed=0, max_examples=1000, shrink_seconds=SHRINK_SECONDS))
        answer = None
        while not isinstance(answer, Answer):
            answer = worker.collect(case_seconds=60.0, patience=1.0)
    finally:
        worker.stop()

    outcome: Outcome = answer.value
    assert outcome.failure is not None
    assert outcome.failure.case == smallest

"""An argument that should matter does: change it, and a result changes or the call raises."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given

from properties.assertions import assert_differ
from properties.case import Case
from properties.runner import Run, run
from properties.schedule import problem
from properties.strategies import cases
from properties.transformations import changed, with_fewer_cached
from properties.variants import contrasting, with_cache, with_new_length


def assert_matters(made: Run, other: Run, what: str) -> None:
    if not any(step.raised for step in other.steps):
        assert_differ(made.outputs, other.outputs, what)


@given(case=cases(max_steps=1, min_rows=1, runs=2))
def test_the_scale_matters(case: Case) -> None:
    case = contrasting(case)

    for factor in (0.5, -1.0, 0.0):
        other = replace(case, scale=factor * case.softmax_scale)
        assert_matters(run(case), run(other), "another scale")


@given(case=cases(max_steps=1, min_rows=1, runs=2))
def test_is_causal_matters(case: Case) -> None:
    case = contrasting(case)

    assert_matters(run(case), run(replace(case, is_causal=not case.is_causal)), "is_causal")


@given(case=cases(ops=("attention_with_kv_cache",), max_steps=1, min_rows=1, runs=2))
def test_new_lens_matter(case: Case) -> None:
    """One real token less in a row: the same columns, one of them padding."""
    case = contrasting(with_cache(case))
    b = case.seed % case.batch
    shorter = with_new_length(case, b, 0, case.rows[b].new[0] - 1)
    lost = max(row.new[0] for row in case.rows) - max(row.new[0] for row in shorter.rows)
    padding = case.steps[0].padding + lost

    other = replace(shorter, steps=(replace(case.steps[0], padding=padding),))
    assert_matters(run(case), run(other), "a shorter new_lens")


@given(case=cases(ops=("attention_with_kv_cache",), max_steps=1, min_rows=1, runs=2))
def test_seq_lens_matter(case: Case) -> None:
    given = problem(contrasting(case))

    assert_matters(run(given), run(with_fewer_cached(given, 1)), "a shorter seq_lens")


@given(case=cases(max_steps=1, min_rows=1, runs=2))
def test_query_key_and_value_matter(case: Case) -> None:
    given = problem(contrasting(case))

    for tensor in ("query", "key", "value"):
        other = changed(given, {tensor: lambda numbers: -numbers})
        assert_matters(run(given), run(other), tensor)

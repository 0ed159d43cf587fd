"""The one place where a run and the references meet: after every call, numbers and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from properties import device as devices
from properties import subjects
from properties.assertions import Expected, Float64Array, Got, Utilisation, assert_shapes, assert_within_budget
from properties.case import Case
from properties.recorder import recorder
from properties.runner import Run, StepRun, run, violation
from properties.schedule import InitialCache, PlannedStep, Problem
from properties.subjects import Subject
from references import kv_cache
from references.attention import attention, visible_keys
from references.error_bounds import budget, overflow_free
from references.kv_cache import CacheOverflow, ReferenceCache
from references.rounding import BitsArray, decode

BYTES = ("inputs", "append", "cache", "guard", "lengths")


def check(case: Case, subject: Subject | None = None) -> Utilisation:
    """Run a case and compare everything with the references, call by call.

    Returns:
        The worst error over budget.

    Raises:
        LawViolation: something is not as the contract says.
    """
    return check_run(run(case, subject))


def check_run(made: Run) -> Utilisation:
    """Compare a run with the references: numbers, then bytes, of each call in turn."""
    worst = Utilisation()
    for step, expected in zip(made.steps, expectations(made), strict=False):
        assert_no_findings(made, ("raised", "overflow", "result"), [step])
        if step.got is not None and expected is not None:
            worst |= compare(step, expected)
        assert_no_findings(made, BYTES, [step])
    return worst


def check_values(made: Run) -> Utilisation:
    """Compare outputs and log-sum-exps of a run with the references."""
    assert_no_findings(made, ("raised", "overflow", "result"))
    worst = Utilisation()
    for step, expected in zip(made.steps, expectations(made), strict=False):
        if step.got is not None and expected is not None:
            worst |= compare(step, expected)
    return worst


def compare(step: StepRun, expected: Expected) -> Utilisation:
    """Compare the numbers of one call that returned."""
    assert step.got is not None
    if expected.out.size == 0:
        assert_shapes(step.got, expected)
        return Utilisation()
    used = assert_within_budget(step.got, expected)
    recorder.compared(used)
    return used


def assert_no_findings(made: Run, kinds: Sequence[str], steps: Sequence[StepRun] | None = None) -> None:
    """No call of a run did anything of these kinds.

    Raises:
        LawViolation: for the first one.
    """
    for step in made.steps if steps is None else steps:
        for finding in step.findings:
            if finding.kind in kinds:
                raise violation(made.case, step, finding, made.is_transformed)


def expectations(made: Run) -> Iterator[Expected | None]:
    """What the references say of each call in turn; None where it must overflow."""
    caches = [_reference(made.problem.initial)]
    for step in made.steps:
        parent = caches[step.plan.parent]
        with made.subject.forced(made.case):  # the tiles of the budget are those of the run
            expected, cache = _expect(made.case, made.subject, step.plan, parent)
        caches.append(cache)
        yield expected


def expected_outputs(made: Run) -> list[tuple[Got, Expected]]:
    """What each call returned beside what the references say of it, for the calls that return something.

    Raises:
        LawViolation: a call that should have returned did not.
    """
    wanted = [expected for expected in expectations(made) if expected is not None]
    pairs = list(zip(made.outputs, wanted, strict=True))
    for got, expected in pairs:
        assert_shapes(got, expected)
    return pairs


def _reference(given: InitialCache | None) -> ReferenceCache | None:
    if given is None:
        return None
    written = np.arange(given.key.shape[2]) < np.array(given.seq_lens, np.int64)[:, None]
    return ReferenceCache(given.key.copy(), given.value.copy(), written, list(given.seq_lens))


def _expect(
    case: Case, subject: Subject, planned: PlannedStep, parent: ReferenceCache | None
) -> tuple[Expected | None, ReferenceCache | None]:
    """What one call returns, and the cache there is after it."""
    if case.op == "attention":
        batch = range(case.batch)
        numbers = [decode(array, case.dtype) for array in (planned.query, planned.key, planned.value)]
        results = [
            attention(*(array[b] for array in numbers), is_causal=case.is_causal, scale=case.softmax_scale)
            for b in batch
        ]
        shape = planned.query.shape
        out = np.array([result[0] for result in results]).reshape(shape)
        lse = np.array([result[1] for result in results]).reshape(shape[:3])
        cache = None
    else:
        try:
            result = kv_cache.step(
                parent,
                planned.query,
                planned.key,
                planned.value,
                fmt=case.dtype,
                seq_lens=list(planned.seq_lens) if parent is not None else None,
                new_lens=list(planned.new_lens),
                cache_max_len=case.cache_max_len,
                update_cache=planned.step.update_cache,
                is_causal=case.is_causal,
                scale=case.softmax_scale,
            )
        except CacheOverflow as overflow:
            if overflow.row != planned.overflow_row:
                raise RuntimeError("references and schedule disagree on the row that overflows") from None
            return None, parent
        out, lse, cache = result.out, result.lse, result.cache or parent
    return _with_budgets(case, subject, planned, parent, out, lse), cache


def _with_budgets(
    case: Case,
    subject: Subject,
    planned: PlannedStep,
    parent: ReferenceCache | None,
    out: Float64Array,
    lse: Float64Array,
) -> Expected:
    """Add the error budget of every row; padding queries are exact."""
    expected = Expected(out, lse, np.zeros_like(out), np.zeros_like(lse), np.ones(lse.shape, np.bool_), {}, {})
    for b in range(case.batch):
        query, key, value = (decode(array, case.dtype) for array in _row(case, planned, parent, b))
        if query.shape[1] == 0:
            continue
        visible = visible_keys(query.shape[1], key.shape[1], case.is_causal)
        cached = planned.seq_lens[b] if case.op == "attention_with_kv_cache" else key.shape[1]
        tiles = subject.tiles(case, planned.q_len, cached, key.shape[1] - cached)
        arguments: dict[str, Any] = {
            "scale": case.softmax_scale,
            "fmt": case.dtype,
            "model": subject.model(devices.current()),
        }
        found = budget(query, key, value, visible, tiles=tiles, **arguments)
        real = (b, slice(None), slice(0, query.shape[1]))
        expected.out_budget[real], expected.lse_budget[real] = found.out, found.lse
        expected.overflow_free[real] = overflow_free(query, key, value, visible, **arguments)
        for terms, parts, like in (
            (expected.out_terms, found.terms, out),
            (expected.lse_terms, found.lse_terms, lse),
        ):
            for name, part in parts.items():
                terms.setdefault(name, np.zeros_like(like))[real] = part
    return expected


def num_splits(given: Problem) -> list[int]:
    """How many splits the first call makes of each row's cached keys, by what the active subject declares."""
    case, step, subject = given.case, given.steps[0], subjects.active()
    if case.op == "attention":
        return [1] * case.batch
    with subject.forced(case):
        lengths = zip(step.seq_lens, step.new_lens, strict=True)
        return [len(subject.tiles(case, step.q_len, cached, new)) for cached, new in lengths]


def visible_problem(
    made: Run, planned: PlannedStep, b: int
) -> tuple[Float64Array, Float64Array, Float64Array, NDArray[np.bool_]]:
    """Real queries of row ``b``, the keys and values they attend to, and which of these each sees.

    For a case of one call on the cache it was given; later calls attend to what earlier ones appended.
    """
    parent = _reference(made.problem.initial)
    query, key, value = (decode(array, made.case.dtype) for array in _row(made.case, planned, parent, b))
    return query, key, value, visible_keys(query.shape[1], key.shape[1], made.case.is_causal)


def _row(
    case: Case, planned: PlannedStep, parent: ReferenceCache | None, b: int
) -> tuple[BitsArray, BitsArray, BitsArray]:
    """Queries of one row and the keys and values they attend to, cached ones first."""
    if case.op == "attention":
        return planned.query[b], planned.key[b], planned.value[b]
    new, cached = planned.new_lens[b], planned.seq_lens[b]
    key, value = planned.key[b, :, :new], planned.value[b, :, :new]
    if parent is not None:
        key = np.concatenate([parent.k_bits[b, :, :cached], key], axis=1)
        value = np.concatenate([parent.v_bits[b, :, :cached], value], axis=1)
    return planned.query[b, :, :new], key, value

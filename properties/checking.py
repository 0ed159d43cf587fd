"""The one place where a run and the references meet: after every call, numbers and bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from properties import answers, subjects
from properties import device as devices
from properties.assertions import Expected, Float64Array, Got, Utilisation, assert_shapes, assert_within_budget
from properties.case import Case
from properties.recorder import recorder
from properties.runner import Run, StepRun, run, violation
from properties.schedule import PlannedStep, Problem
from properties.subjects import Subject
from references.error_bounds import LSE_TERMS, TERMS, Sequence, budgets

# Numbers of queries, keys and values after which the budgets of the calls so far are computed, all at once.
NUMBERS_TOGETHER = 1 << 20

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


def assert_no_findings(made: Run, kinds: Collection[str], steps: Collection[StepRun] | None = None) -> None:
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
    waiting: list[Answer | None] = []
    for answer in answers_of(made):
        waiting.append(answer)
        if sum(answer.size for answer in waiting if answer is not None) > NUMBERS_TOGETHER:
            yield from _with_budgets(made, waiting)
            waiting = []
    yield from _with_budgets(made, waiting)


def answers_of(made: Run) -> Iterator[Answer | None]:
    """The exact results of each call in turn; None where it must overflow."""
    case = made.case
    caches = [answers.reference_cache(made.problem.initial)]
    for step in made.steps:
        parent = caches[step.plan.parent]
        right = answers.results(case, step.plan, parent)
        if right is None:
            caches.append(parent)
            yield None
            continue
        with made.subject.forced(case):  # the tiles of the budget are those of the run
            rows = answers.attended(case, made.subject, step.plan, parent)
        caches.append(right[2])
        yield Answer(right[0], right[1], rows)


@dataclass(frozen=True)
class Answer:
    """What one call returns, and what the queries of each batch row attended to.

    Attributes:
        out: [batch, num_q_heads, q_len, head_dim]; zeros in padding queries.
        lse: [batch, num_q_heads, q_len]; -inf in padding queries.
        rows: real queries only.
    """

    out: Float64Array
    lse: Float64Array
    rows: list[Sequence]

    @property
    def size(self) -> int:
        """Numbers held."""
        return sum(row.key.size + row.value.size + row.query.size for row in self.rows)


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


def _with_budgets(made: Run, waiting: list[Answer | None]) -> list[Expected | None]:
    """Add the error budget of every row; padding queries are exact."""
    rows = [row for answer in waiting if answer is not None for row in answer.rows]
    case, model = made.case, made.subject.model(devices.current())
    found = iter(budgets(rows, scale=case.softmax_scale, fmt=case.dtype, model=model))
    expected: list[Expected | None] = []
    for answer in waiting:
        if answer is None:
            expected.append(None)
            continue
        out, lse = answer.out, answer.lse
        terms, lse_terms = np.zeros((len(TERMS), *out.shape)), np.zeros((len(LSE_TERMS), *lse.shape))
        free = np.ones(lse.shape, np.bool_)
        for b, row in enumerate(answer.rows):
            real, one = slice(0, row.query.shape[1]), next(found)
            terms[:, b, :, real], lse_terms[:, b, :, real] = one.by_term, one.lse_by_term
            free[b, :, real] = one.overflow_free
        parts, lse_parts = dict(zip(TERMS, terms, strict=True)), dict(zip(LSE_TERMS, lse_terms, strict=True))
        budget, lse_budget = np.add.reduce(terms), np.add.reduce(lse_terms)
        expected.append(Expected(out, lse, budget, lse_budget, free, parts, lse_parts))
    return expected


def split_starts(given: Problem) -> list[tuple[int, ...]]:
    """Where the splits of each row's cached keys start in the first call, by what the active subject declares."""
    case, step, subject = given.case, given.steps[0], subjects.active()
    if case.op == "attention":
        return [(0,)] * case.batch
    with subject.forced(case):
        lengths = zip(step.seq_lens, step.new_lens, strict=True)
        tiles = [subject.tiles(case, step.q_len, cached, new) for cached, new in lengths]
    return [tuple(split[0][0] for split in splits if split) for splits in tiles]


def visible_problem(
    made: Run, planned: PlannedStep, b: int
) -> tuple[Float64Array, Float64Array, Float64Array, NDArray[np.bool_]]:
    """Real queries of row ``b``, the keys and values they attend to, and which of these each sees.

    For a case of one call on the cache it was given; later calls attend to what earlier ones appended.
    """
    parent = answers.reference_cache(made.problem.initial)
    row = answers.attended(made.case, made.subject, planned, parent)[b]
    return row.query, row.key, row.value, row.visible

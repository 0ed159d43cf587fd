"""The comparisons of the suite and the text of a failure.

There are two: within a derived budget of the reference, or the same bits. What a kernel gave (``Got``) and what it
should have given (``Expected``) have different types, so that swapping them is an error and not a weaker test.
NaN, a wrong shape and a comparison of nothing never pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from properties.case import Case
from references.rounding import decode

BitsArray = NDArray[Any]  # uint16 or uint32: raw bit patterns
Float64Array = NDArray[np.float64]

BUDGET_TERMS_SHOWN = 3
# Kind of a violation after which the process can launch nothing any more.
CONTEXT_LOST = "context lost"


@dataclass(frozen=True, eq=False)
class Got:
    """What a kernel returned from one call, as bits.

    Attributes:
        out: [batch, num_q_heads, q_len, head_dim], bit patterns of format ``fmt``.
        lse: [batch, num_q_heads, q_len], bit patterns of float32.
        fmt: format of ``out``.
        case: the problem it was run on.
        step: which call of the schedule.
        fresh: pattern that filled ``out`` before the call; None if unknown.
        places: for each axis (batch, head, query) the index in the call's own output, so that a selection still
            knows where its elements were.
        is_transformed: the case alone does not say what it was run on.
        has_lse: False for a kernel that returns none; then ``lse`` holds zeros that are not compared.
    """

    out: BitsArray
    lse: BitsArray
    fmt: str
    case: Case
    step: int = 0
    fresh: int | None = None
    places: tuple[NDArray[np.intp], ...] = ()
    is_transformed: bool = False
    has_lse: bool = True

    def __post_init__(self) -> None:
        """Number the elements of an output that is not yet a selection."""
        if not self.places:
            object.__setattr__(self, "places", tuple(np.arange(n) for n in self.out.shape[:3]))

    def rows(self, index: int | slice | Sequence[int]) -> Got:
        """Only these rows of the batch, in this order."""
        return self._select(0, index)

    def heads(self, index: int | slice | Sequence[int]) -> Got:
        """Only these query heads, in this order."""
        return self._select(1, index)

    def queries(self, index: int | slice | Sequence[int]) -> Got:
        """Only these queries, in this order."""
        return self._select(2, index)

    def _select(self, axis: int, index: int | slice | Sequence[int]) -> Got:
        chosen = np.atleast_1d(np.arange(self.out.shape[axis])[index])
        places = tuple(p[chosen] if a == axis else p for a, p in enumerate(self.places))
        return replace(self, out=self.out.take(chosen, axis), lse=self.lse.take(chosen, axis), places=places)

    def place(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """The coordinates in the call's own output of an element of this selection."""
        return tuple(int(p[i]) for p, i in zip(self.places, index, strict=False)) + tuple(index[3:])

    @property
    def values(self) -> Float64Array:
        """``out`` as numbers."""
        return decode(self.out, self.fmt)

    @property
    def lse_values(self) -> Float64Array:
        """``lse`` as numbers."""
        return decode(self.lse, "float32")


@dataclass(frozen=True, eq=False)
class Expected:
    """What the reference says one call returns, and how far a correct kernel may be from it.

    Attributes:
        out: [batch, num_q_heads, q_len, head_dim]
        lse: [batch, num_q_heads, q_len]
        out_budget: like ``out``; 0 where the result is exact.
        lse_budget: like ``lse``.
        overflow_free: [batch, num_q_heads, q_len], where every intermediate of a kernel is provably finite.
            Elsewhere a kernel may overflow; what it then gives is not compared.
        out_terms: parts of ``out_budget`` by name, in the order they arise.
        lse_terms: parts of ``lse_budget`` by name.
    """

    out: Float64Array
    lse: Float64Array
    out_budget: Float64Array
    lse_budget: Float64Array
    overflow_free: NDArray[np.bool_]
    out_terms: dict[str, Float64Array] = field(default_factory=dict)
    lse_terms: dict[str, Float64Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Sighting:
    """One element of one run: which case, which call, which tensor, where."""

    case: Case
    step: int
    tensor: str
    index: tuple[int, ...]


class LawViolation(AssertionError):
    """A kernel broke a law.

    Attributes:
        kind: what went wrong in one or two words ("out", "lse", "cache", "guard", "overflow", "crash", ...).
        report: the text of the failure, without the replay command.
        case: the case on which it happened; filled in by whoever runs the law if the assertion did not know it.
        sightings: the elements compared, the worst one first in each run; what a stand-alone script shows.
    """

    def __init__(self, kind: str, report: str, case: Case | None = None, sightings: Sequence[Sighting] = ()) -> None:
        """Keep the pieces; the message is the report."""
        super().__init__(report)
        self.kind = kind
        self.report = report
        self.case = case
        self.sightings = tuple(sightings)

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive the way from a worker process to its parent."""
        return type(self), (self.kind, self.report, self.case, self.sightings)


@dataclass(frozen=True)
class Utilisation:
    """Worst error over budget of a comparison that passed: 0 is exact, 1 is the limit."""

    out: float = 0.0
    lse: float = 0.0

    def __or__(self, other: Utilisation) -> Utilisation:
        """The worse of two."""
        return Utilisation(max(self.out, other.out), max(self.lse, other.lse))


def describe(case: Case, step: int = 0) -> str:
    """The case in one line, as a person would say it."""
    lens = [row.cached for row in case.rows]
    news = [list(row.new) for row in case.rows]
    parts = [f"batch={len(case.rows)}"]
    if case.op == "attention":
        parts += [f"q_len={news[0][0] if news else 0}", f"kv_len={lens[0] if lens else 0}"]
    else:
        parts += [f"cached={_only(lens)}", f"new={_only([_only(n) for n in news])}"]
        if len(case.steps) > 1:
            parts.append(f"step {step + 1} of {len(case.steps)}")
    parts.append(f"heads {case.num_kv_heads * case.group_size}:{case.num_kv_heads}")
    parts += [f"head_dim={case.head_dim}", case.dtype]
    parts += ["causal"] * case.is_causal
    for name in ("block_m", "block_n", "kv_split_size", "scale"):
        if getattr(case, name) is not None:
            parts.append(f"{name}={getattr(case, name)}")
    for tensor in ("query", "key", "cache"):
        layout = getattr(case, f"{tensor}_layout")
        parts += [f"{layout} {tensor}"] * (layout != "contiguous")
    return ", ".join([*parts, f"{case.values} values"])


def _only(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _hex(value: float) -> str:
    """A short hexadecimal float: rounded to float32, trailing zeros dropped."""
    with np.errstate(over="ignore"):
        text = float(np.float32(value)).hex() if abs(value) >= 2.0**-126 else float(value).hex()
    if "p" not in text:
        return text
    mantissa, exponent = text.split("p")
    return f"{mantissa.rstrip('0').rstrip('.')}p{exponent}"


def _at(index: tuple[int, ...]) -> str:
    names = ("batch", "head", "q", "d")
    return "[" + ", ".join(f"{name}={i}" for name, i in zip(names, index, strict=False)) + "]"


def _dominant(terms: Mapping[str, Float64Array], index: tuple[int, ...]) -> str:
    parts = sorted(((float(term[index]), name) for name, term in terms.items()), reverse=True)
    shown = [f"{name} {size:.1e}" for size, name in parts[:BUDGET_TERMS_SHOWN] if size > 0]
    return f" ({' + '.join(shown)})" if shown else ""


def assert_within_budget(got: Got, expected: Expected) -> Utilisation:
    """Output and log-sum-exp lie within their budgets of the reference; every element is looked at.

    Returns:
        The worst error over budget.

    Raises:
        LawViolation: an element is off by more than its budget, or is not a number, or a shape is wrong.
        TypeError: the arguments are swapped.
        ValueError: there is nothing to compare, or a budget is negative or not a number.
    """
    if not isinstance(got, Got) or not isinstance(expected, Expected):
        raise TypeError(
            f"got must be a Got and expected an Expected, got {type(got).__name__} and {type(expected).__name__}"
        )
    assert_shapes(got, expected)
    if expected.out.size == 0:
        raise ValueError("expected must have elements, got nothing to compare")
    finite = expected.overflow_free
    out = _within("out", got.values, expected.out, expected.out_budget, finite[..., None], expected.out_terms, got)
    if not got.has_lse:
        return Utilisation(out=out)
    lse = _within("lse", got.lse_values, expected.lse, expected.lse_budget, finite, expected.lse_terms, got)
    return Utilisation(out=out, lse=lse)


def assert_shapes(got: Got, expected: Expected) -> None:
    """Output and log-sum-exp have the shapes the contract says."""
    for name, is_shape, should in (
        ("out", got.out.shape, expected.out.shape),
        ("lse", got.lse.shape, expected.lse.shape),
    ):
        if is_shape != should:
            report = (
                f"{name} has the wrong shape\n  expected {list(should)}, got {list(is_shape)}\n"
                f"  case: {describe(got.case, got.step)}"
            )
            raise LawViolation("shape", report, got.case, [Sighting(got.case, got.step, name, ())])


def error_over_budget(
    got: Float64Array, expected: Float64Array, budget: Float64Array, overflow_free: NDArray[np.bool_]
) -> tuple[Float64Array, Float64Array]:
    """(error, error / budget) of each element: both 0 where the result is right or may overflow, never NaN.

    Args:
        got, expected, budget: of one shape.
        overflow_free: broadcasts to that; see ``Expected``.
    """
    # Where a non-finite input is visible there is no budget; the result must be non-finite if the reference's is.
    unbounded = np.isnan(budget)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(got - expected)
        # Equal infinities (lse of a query that sees nothing) differ by NaN.
        error = np.where(got == expected, 0.0, error)
        both_poisoned = unbounded & (~np.isfinite(got) | np.isfinite(expected))
        may_overflow = ~overflow_free & ~np.isfinite(got)
        error = np.where(both_poisoned | may_overflow, 0.0, error)
        ratio = np.where(error == 0.0, 0.0, error / budget)
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    return error, ratio


def _within(
    name: str,
    got: Float64Array,
    expected: Float64Array,
    budget: Float64Array,
    overflow_free: NDArray[np.bool_],
    terms: Mapping[str, Float64Array],
    source: Got,
) -> float:
    if (budget < 0).any():
        raise ValueError(f"the budget of {name} must be non-negative, got {float(np.nanmin(budget))}")
    error, ratio = error_over_budget(got, expected, budget, overflow_free)
    worst = float(ratio.max())
    if worst <= 1.0:
        return worst

    count = int((ratio > 1.0).sum())
    wrong = np.flatnonzero(ratio.ravel() == worst)
    # Among equally wrong elements a number says more than a NaN, and the first one is the easiest to find.
    flat = int(wrong[0])
    index = tuple(int(i) for i in np.unravel_index(flat, ratio.shape))
    place = source.place(index)
    lines = [
        f"{name} exceeds its error budget in {count} of {ratio.size} elements",
        f"  worst at {_at(place)}: expected {_hex(float(expected[index]))}, got {_hex(float(got[index]))}",
    ]
    allowed = float(budget[index])
    if np.isfinite(error[index]) and allowed > 0:
        times = f"{worst:.1f}" if worst < 1000 else f"{worst:.0e}"
        lines.append(f"  error {float(error[index]):.1e} = {times} x budget {allowed:.1e}{_dominant(terms, index)}")
    elif np.isfinite(error[index]):
        lines.append(f"  error {float(error[index]):.1e}, but this element must be exact")
    else:
        lines.append(f"  not a finite number; the budget is {allowed:.1e}{_dominant(terms, index)}")
    lines.append(f"  case: {describe(source.case, source.step)}")
    sighting = Sighting(source.case, source.step, name, place)
    raise LawViolation(name, "\n".join(lines), source.case, [sighting])


def assert_same_bits(first: Got, second: Got, what: str = "the two runs") -> None:
    """Two runs gave the same bits, in output and log-sum-exp, and both wrote every element.

    Args:
        first: one run, or a selection of its rows, heads or queries.
        second: the other, of the same shape.
        what: names the two in the failure ("poisoned and clean").

    Raises:
        LawViolation: a bit differs, or an output was never written.
        TypeError: an argument is not what a kernel returned.
        ValueError: the selections differ in shape or are empty: the law compares the wrong things.
    """
    if not isinstance(first, Got) or not isinstance(second, Got):
        raise TypeError(f"both arguments must be a Got, got {type(first).__name__}, {type(second).__name__}")
    if first.out.shape != second.out.shape or first.fmt != second.fmt:
        raise ValueError(
            f"both sides must have one shape and format, got {first.fmt} {first.out.shape} "
            f"and {second.fmt} {second.out.shape}"
        )
    if first.out.size == 0:
        raise ValueError("the selections must have elements, got nothing to compare")
    for got in (first, second):
        unwritten = np.argwhere(np.full(got.out.shape, got.fresh is not None) & (got.out == got.fresh))
        if len(unwritten):
            place = got.place(tuple(int(i) for i in unwritten[0]))
            report = (
                f"out was never written in {len(unwritten)} of {got.out.size} elements\n"
                f"  first at {_at(place)}\n  case: {describe(got.case, got.step)}"
            )
            raise LawViolation("unwritten", report, got.case, [Sighting(got.case, got.step, "out", place)])
    for name, one, other, fmt in (
        ("out", first.out, second.out, first.fmt),
        ("lse", first.lse, second.lse, "float32"),
    ):
        differing = np.argwhere(one != other)
        if not len(differing):
            continue
        index = tuple(int(i) for i in differing[0])
        here, there = first.place(index), second.place(index)
        digits = one.dtype.itemsize * 2
        shown = [f"{_hex(float(decode(bits[index], fmt)))} (0x{int(bits[index]):0{digits}x})" for bits in (one, other)]
        where = _at(here) if here == there else f"{_at(here)} and {_at(there)}"
        lines = [
            f"{name} of {what} differs in {len(differing)} of {one.size} elements; the bits must be the same",
            f"  first at {where}: {shown[0]} and {shown[1]}",
            f"  case: {describe(first.case, first.step)}",
        ]
        if second.case != first.case:
            lines.append(f"  and:  {describe(second.case, second.step)}")
        sightings = [
            Sighting(first.case, first.step, name, here),
            Sighting(second.case, second.step, name, there),
        ]
        if first.is_transformed or second.is_transformed:
            sightings = []  # a script made of the cases would not show it
        raise LawViolation("same bits", "\n".join(lines), first.case, sightings)


def assert_same_outputs(first: Sequence[Got], second: Sequence[Got], what: str = "the two runs") -> None:
    """Two runs of one schedule gave the same bits at every call that has elements."""
    if len(first) != len(second):
        raise ValueError(f"both runs must have as many calls, got {len(first)} and {len(second)}")
    for one, other in zip(first, second, strict=True):
        if one.out.size or other.out.size:
            assert_same_bits(one, other, what)


def assert_close(
    first: Got,
    second: Got,
    allowed: tuple[Expected, Expected],
    what: str = "the two runs",
    *,
    lse_moves_by: Float64Array | float = 0.0,
) -> None:
    """Two runs agree within the sum of their error budgets.

    Args:
        first: one run, or a selection of its rows, heads or queries.
        second: the other, of the same shape.
        allowed: the budgets of both.
        what: names the two in the failure.
        lse_moves_by: what the log-sum-exp of the second is larger by.
    """
    finite = allowed[0].overflow_free & allowed[1].overflow_free
    out_budget = allowed[0].out_budget + allowed[1].out_budget
    lse_budget = allowed[0].lse_budget + allowed[1].lse_budget
    assert_near("out", first, first.values, second.values, out_budget, finite[..., None], what)
    assert_near("lse", first, first.lse_values + lse_moves_by, second.lse_values, lse_budget, finite, what)


def assert_near(
    name: str,
    source: Got,
    first: Float64Array,
    second: Float64Array,
    budget: Float64Array,
    comparable: NDArray[np.bool_],
    what: str,
) -> None:
    """Two arrays differ by at most a budget; equal infinities are equal, NaN is near nothing.

    Args:
        name: "out" or "lse".
        source: the run that ``first`` is of, which says where its elements were.
        first: numbers.
        second: numbers of the same shape.
        budget: of the same shape.
        comparable: where both are; elsewhere a kernel may overflow.
        what: names the two in the failure.

    Raises:
        LawViolation: an element differs by more.
        ValueError: the shapes differ.
    """
    if first.shape != second.shape or first.shape != budget.shape:
        raise ValueError(f"both sides must have one shape, got {first.shape}, {second.shape} and {budget.shape}")
    if name == "lse" and not source.has_lse:
        return
    with np.errstate(invalid="ignore"):
        near = (np.abs(first - second) <= budget) | (first == second)
    overflown = ~comparable & ~(np.isfinite(first) & np.isfinite(second))
    far = np.argwhere(~(near | overflown))
    if not len(far):
        return
    index = tuple(int(i) for i in far[0])
    numbers = f"{_hex(float(first[index]))} and {_hex(float(second[index]))}"
    report = (
        f"{name} of {what} differs by more than allowed in {len(far)} of {first.size} elements\n"
        f"  first at {_at(source.place(index))}: {numbers}, {float(abs(first[index] - second[index])):.1e} apart, "
        f"allowed {float(budget[index]):.1e}\n"
        f"  case: {describe(source.case, source.step)}"
    )
    raise LawViolation("two runs", report, source.case)


def assert_same_numbers(name: str, source: Got, first: Float64Array, second: Float64Array, what: str) -> None:
    """Two arrays hold the same numbers, +0 and -0 being one."""
    assert_near(name, source, first, second, np.zeros(first.shape), np.ones(first.shape, np.bool_), what)


def assert_differ(first: Sequence[Got], second: Sequence[Got], what: str) -> None:
    """Two runs that must not agree do not.

    Raises:
        LawViolation: every bit is the same.
    """
    pairs = list(zip(first, second, strict=True))
    if all(np.array_equal(a.out, b.out) and np.array_equal(a.lse, b.lse) for a, b in pairs):
        case = first[0].case
        raise LawViolation("ignored", f"{what} changes no bit of any result\n  case: {describe(case)}", case)

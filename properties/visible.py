"""Which keys and values a query sees, by the contract."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from properties.assertions import Float64Array, Got, LawViolation, assert_same_numbers, describe
from properties.case import Case
from properties.checking import expected_outputs
from properties.runner import Run, StepRun
from properties.schedule import PlannedStep
from properties.transformations import histories
from references.attention import num_visible_keys
from references.rounding import decode


def visible_counts(planned: PlannedStep, is_causal: bool) -> NDArray[np.int64]:
    """[batch, q_len]: how many keys each query sees, the first ones of its row; padding sees none."""
    counts = np.zeros((len(planned.new_lens), planned.q_len), np.int64)
    for b, (new, keys) in enumerate(zip(planned.new_lens, planned.kv_lens, strict=True)):
        for i in range(new):
            counts[b, i] = num_visible_keys(i, new, keys, is_causal)
    return counts


def visible_values(made: Run, step: StepRun) -> tuple[Float64Array, Float64Array, NDArray[np.bool_]]:
    """Least and largest visible value of each element of the output, and whether its query sees any key.

    Both are 0 where it sees none: [batch, num_q_heads, q_len, head_dim] and [batch, 1, q_len, 1].
    """
    case, planned = made.case, step.plan
    counts = visible_counts(planned, case.is_causal)
    past = histories(made.problem)[planned.index]
    low = np.zeros(planned.query.shape)
    high = np.zeros(planned.query.shape)
    for b, keys in enumerate(planned.kv_lens):
        value = planned.value[b, :, : keys - planned.seq_lens[b]]
        if past is not None:
            value = np.concatenate([past.value[b, :, : planned.seq_lens[b]], value], axis=1)
        numbers = np.repeat(decode(value, case.dtype), case.group_size, axis=0)  # [num_q_heads, keys, head_dim]
        if not keys:
            continue
        least, most = np.minimum.accumulate(numbers, axis=1), np.maximum.accumulate(numbers, axis=1)
        seen = np.flatnonzero(counts[b])
        low[b][:, seen] = least[:, counts[b][seen] - 1]
        high[b][:, seen] = most[:, counts[b][seen] - 1]
    return low, high, (counts > 0)[:, None, :, None]


def largest_logits(made: Run, step: StepRun) -> tuple[Float64Array, Float64Array]:
    """The largest logit that each query sees and that plus ln of their number, [batch, num_q_heads, q_len].

    Both are -inf where it sees none.
    """
    case, planned = made.case, step.plan
    past = histories(made.problem)[planned.index]
    largest = np.full(planned.query.shape[:3], -np.inf)
    counts = visible_counts(planned, case.is_causal)
    for b, keys in enumerate(planned.kv_lens):
        key = planned.key[b, :, : keys - planned.seq_lens[b]]
        if past is not None:
            key = np.concatenate([past.key[b, :, : planned.seq_lens[b]], key], axis=1)
        rows = np.repeat(decode(key, case.dtype), case.group_size, axis=0)  # [num_q_heads, keys, head_dim]
        seen = np.flatnonzero(counts[b])
        if seen.size:
            query = decode(planned.query[b], case.dtype)[:, seen]
            logits = case.softmax_scale * np.einsum("hqd,hkd->hqk", query, rows)
            hidden = np.arange(keys) >= counts[b][seen][:, None]
            largest[b][:, seen] = np.where(hidden, -np.inf, logits).max(axis=2)
    return largest, largest + np.log(np.maximum(counts, 1))[:, None]


def reached_by(case: Case, planned: PlannedStep) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """The elements of output and log-sum-exp that a patched key or value can reach.

    A key reaches every dim of the queries of its group that see it, a value its own dim of them.
    """
    counts = visible_counts(planned, case.is_causal)
    out, lse = np.zeros(planned.query.shape, bool), np.zeros(planned.query.shape[:3], bool)
    for patch in case.patches:
        sees = counts[patch.row] > patch.token
        heads = slice(patch.head * case.group_size, (patch.head + 1) * case.group_size)
        if patch.tensor == "key":
            out[patch.row, heads] |= sees[:, None]
            lse[patch.row, heads] |= sees
        elif patch.tensor == "value":
            out[patch.row, heads, :, patch.dim] |= sees
    return out, lse


def assert_reaches_what_sees_it(made: Run, clean: Sequence[Got]) -> None:
    """Compare a run with non-finite elements with the outputs ``clean`` of one without them.

    Raises:
        LawViolation: one of them changes what does not see it, or is hidden from what does.
    """
    case = made.case
    steps = [step for step in made.steps if step.got is not None]
    for step, (got, expected), plain in zip(steps, expected_outputs(made), clean, strict=True):
        out, lse = reached_by(case, step.plan)
        finite_out, finite_lse = np.where(out, 0.0, got.values), np.where(lse, 0.0, got.lse_values)
        assert_same_numbers("out", got, finite_out, np.where(out, 0.0, plain.values), "outputs that do not see it")
        assert_same_numbers("lse", got, finite_lse, np.where(lse, 0.0, plain.lse_values), "rows that do not see it")
        hidden = np.argwhere(~np.isfinite(expected.out) & np.isfinite(got.values))
        if len(hidden):
            report = f"out hides a visible NaN or infinity, first at {hidden[0].tolist()}\n  case: {describe(case)}"
            raise LawViolation("hidden", report, case)

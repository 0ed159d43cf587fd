"""Attention over two sets of keys, merged by their log-sum-exps, and how exact that can be."""

from __future__ import annotations

import numpy as np

from properties.assertions import Expected, Float64Array, Got


def _weight(one: Float64Array, other: Float64Array) -> Float64Array:
    """Share of the first of two sets by their log-sum-exps; 0 for a set without keys."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(one == -np.inf, 0.0, 1.0 / (1.0 + np.exp(np.where(other == -np.inf, -np.inf, other - one))))


def merged(one: Got, other: Got) -> tuple[Float64Array, Float64Array]:
    """Output and log-sum-exp of the union; NaN in a log-sum-exp is NaN in both."""
    share = _weight(one.lse_values, other.lse_values)[..., None]
    with np.errstate(invalid="ignore"):
        out = np.where(share == 0, 0.0, share * one.values) + np.where(share == 1, 0.0, (1 - share) * other.values)
        return out, np.logaddexp(one.lse_values, other.lse_values)


def merged_budget(
    one: tuple[Got, Expected], other: tuple[Got, Expected], whole: Expected
) -> tuple[Float64Array, Float64Array]:
    """How far the merged result may be from the whole one, all three within their budgets.

    With w the first set's share, d the budgets of both log-sum-exps together: the share of the merge is off by
    at most w (1 - w) (e^d - 1), because the logistic function's slope s(1 - s) changes by at most a factor e^d.
    The log-sum-exp of the union moves by at most the larger of the two.
    """
    share = _weight(one[0].lse_values, other[0].lse_values)[..., None]
    slack = np.minimum(one[1].lse_budget + other[1].lse_budget, 700.0)[..., None]
    with np.errstate(invalid="ignore", over="ignore"):
        moved = np.minimum(share * (1 - share) * np.expm1(slack), 1.0)
        apart = np.where(moved > 0, np.abs(one[0].values - other[0].values), 0.0)
        out = share * one[1].out_budget + (1 - share) * other[1].out_budget + moved * apart
    lse = np.maximum(one[1].lse_budget, other[1].lse_budget)
    rounding = 2.0**-50 * (np.abs(one[0].values) + np.abs(other[0].values))  # of the merge itself, in float64
    lse_rounding = 2.0**-50 * np.where(np.isfinite(whole.lse), 1 + np.abs(whole.lse), 0.0)
    return out + whole.out_budget + rounding, lse + whole.lse_budget + lse_rounding

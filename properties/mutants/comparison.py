"""Faults of the suite's own comparisons: the tests of the assertions have to see them."""

from __future__ import annotations

from properties.mutants.mutant import ASSERTIONS, RUNNER, Edit, Mutant

MUTANTS = (
    Mutant(
        "W7",
        "ORACLE",
        "NaN passes the comparison with the reference",
        "the assertions",
        (
            Edit(
                ASSERTIONS,
                "    ratio = np.where(np.isnan(ratio), np.inf, ratio)\n",
                "    ratio = np.where(np.isnan(ratio), 0.0, ratio)\n",
            ),
        ),
    ),
    Mutant(
        "F140",
        "ORACLE",
        "the mean error is compared instead of the worst",
        "the assertions",
        (Edit(ASSERTIONS, "    worst = float(ratio.max())\n", "    worst = float(ratio.mean())\n"),),
    ),
    Mutant(
        "F141",
        "ORACLE",
        "outputs that were never written have the same bits",
        "the assertions",
        (
            Edit(
                ASSERTIONS,
                "np.full(got.out.shape, got.fresh is not None) & (got.out == got.fresh)",
                "np.zeros(got.out.shape, np.bool_)",
            ),
        ),
    ),
    Mutant(
        "F142",
        "ORACLE",
        "guards are not looked at",
        "the runner",
        (Edit(RUNNER, "            if broken is not None and not any", "            if broken is None and not any"),),
    ),
)

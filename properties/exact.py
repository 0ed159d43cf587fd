"""Runs on the exact lattice against integer arithmetic."""

from __future__ import annotations

import numpy as np

from properties.assertions import assert_same_numbers
from properties.runner import Run
from properties.transformations import histories
from properties.values import lattice_exponent
from references.attention import visible_keys
from references.lattice import solve
from references.rounding import decode


def assert_exact(made: Run, division_error: float) -> None:
    """Outputs are the one right answer, bit for bit, and so are log-sum-exps whose logarithm is exact.

    Args:
        made: a run on the lattice.
        division_error: of the device; where it could change the bits of an output, that one is not compared.
    """
    case = made.case
    made.outputs  # noqa: B018 - a call that should have returned did
    for step, past in zip(made.steps, histories(made.problem), strict=True):
        planned, got = step.plan, step.got
        if got is None:
            continue
        for b, new in enumerate(planned.new_lens):
            if not new:
                continue
            key, value = planned.key[b], planned.value[b]
            if case.op != "attention":
                key, value = key[:, :new], value[:, :new]
            if past is not None:
                cached = planned.seq_lens[b]
                key = np.concatenate([past.key[b, :, :cached], key], axis=1)
                value = np.concatenate([past.value[b, :, :cached], value], axis=1)
            query, key, value = (decode(bits, case.dtype) for bits in (planned.query[b, :, :new], key, value))
            right = solve(
                query,
                key,
                value,
                visible_keys(new, key.shape[1], case.is_causal),
                scale_exponent=lattice_exponent(case.scale),
                fmt=case.dtype,
                division_error=division_error,
            )
            row = got.rows(b).queries(slice(new))
            out, lse = decode(right.out_bits, case.dtype)[None], right.lse[None]
            out = np.where(right.division_sensitive, row.values, out)
            lse = np.where(right.lse_is_exact | np.isinf(lse), lse, row.lse_values)
            assert_same_numbers("out", row, row.values, out, "the kernel and integer arithmetic")
            assert_same_numbers("lse", row, row.lse_values, lse, "the kernel and integer arithmetic")

"""The probe's test vectors identify the simulated units they are run on."""

from typing import Any

import numpy as np
import pytest

from properties.probing.accumulator import agreement, identify, random_operands
from references.accumulators import blas_dot, forward_dot, tensor_core_dot
from references.rounding import BFLOAT16, FLOAT16, Format


def fused(terms: int, fraction_bits: int, fmt: Format, carried: bool = True) -> Any:
    def unit(a: Any, b: Any, c: Any) -> Any:
        start = c.astype(np.float32)
        through = start if carried else np.zeros_like(start)
        result = tensor_core_dot(
            a, b, through, terms=terms, fraction_bits=fraction_bits, smallest_normal=fmt.smallest_normal
        )
        return result if carried else start + result

    return unit


@pytest.mark.parametrize("fmt", [FLOAT16, BFLOAT16])
@pytest.mark.parametrize(("terms", "fraction_bits"), [(4, 23), (8, 24), (16, 25), (32, 13)])
@pytest.mark.parametrize("carried", [True, False])
def test_a_fused_unit_is_identified_and_reproduced(terms: int, fraction_bits: int, fmt: Format, carried: bool) -> None:
    unit = fused(terms, fraction_bits, fmt, carried)

    found = identify(unit)

    assert found.fused
    assert (found.fused_products, found.fused_fraction_bits) == (terms, fraction_bits)
    assert found.contiguous
    assert found.carried == carried
    assert found.result_fraction_bits == min(fraction_bits, 23)
    assert (found.rounding == "toward zero") == (fraction_bits >= 24)
    assert agreement(unit, found, fmt, calls=3) == 1.0


def test_a_permuted_unit_is_not_mistaken_for_an_ordered_one() -> None:
    order = np.random.default_rng(0).permutation(64)
    ordered = fused(8, 24, FLOAT16)

    def unit(a: Any, b: Any, c: Any) -> Any:
        return ordered(a[:, order], b[order], c)

    found = identify(unit)

    assert not found.contiguous
    assert agreement(unit, found, FLOAT16, calls=3) < 1.0


def test_a_chain_of_additions_is_not_fused() -> None:
    found = identify(lambda a, b, c: forward_dot(a, b, c.astype(np.float32)))
    assert not found.fused
    assert found.carried
    assert found.fused_products == 1


def test_matmul_is_not_fused_and_not_carried() -> None:
    found = identify(lambda a, b, c: blas_dot(a, b, c.astype(np.float32)))
    assert not found.fused
    assert not found.carried


def test_agreement_sees_a_model_that_is_wrong_by_one_bit() -> None:
    found = identify(fused(16, 25, FLOAT16))
    assert agreement(fused(16, 24, FLOAT16), found, FLOAT16, calls=3) < 1.0


def test_random_operands_are_representable() -> None:
    a, b, c = random_operands(FLOAT16, 1)
    np.testing.assert_array_equal(a, a.astype(np.float16))
    np.testing.assert_array_equal(b, b.astype(np.float16))
    np.testing.assert_array_equal(c, c.astype(np.float32))

"""Families of inputs on which attention kernels and error bounds behave differently."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from references.rounding import Format, round_to

Float64Array = NDArray[np.float64]
Family = Literal[
    "normal",
    "large logits",
    "huge logits",
    "wide range",
    "near ties",
    "equal keys",
    "subnormal",
    "one key wins",
    "rising",
    "falling",
    "positive values",
    "values near the limit",
    "constant values",
    "coherent rounding",
    "zero query",
    "integers",
    "tail at the underflow of P",
]
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class Problem:
    """One query and its keys: query [head_dim], key and value [kv_len, head_dim], exact in the format."""

    query: Float64Array
    key: Float64Array
    value: Float64Array
    scale: float


def draw(family: Family, kv_len: int, head_dim: int, fmt: Format, seed: int) -> Problem:
    """A problem of the family; head_dim must be at least 2."""
    rng = np.random.default_rng([FAMILIES.index(family), kv_len, head_dim, fmt.precision, seed])
    query = rng.standard_normal(head_dim)
    key = rng.standard_normal((kv_len, head_dim))
    value = rng.standard_normal((kv_len, head_dim))
    scale = head_dim**-0.5
    along_query = query / (query @ query) * math.sqrt(head_dim)  # adds 1 to the logit
    match family:
        case "normal":
            pass
        case "large logits":
            query *= 30
        case "huge logits":
            query *= 300 if fmt.emin > -20 else 1000
        case "wide range":
            query *= np.exp2(rng.integers(-8, 5, head_dim))
            key *= np.exp2(rng.integers(-8, 5, key.shape))
            value *= np.exp2(rng.integers(-12, 8, value.shape))
        case "near ties":
            key[:] = key[0] * (1 + rng.integers(-1, 2, key.shape) * fmt.unit_roundoff())
            query *= 4
        case "equal keys":
            key[:] = key[0]
            query *= 4
        case "subnormal":
            query *= 64
            key *= 2.0**-14 if fmt.emin > -20 else 2.0**-60
            value *= 2.0 ** (fmt.emin - 3)
        case "one key wins":
            key[rng.integers(kv_len)] = 3 * query
        case "rising":
            key = 0.3 * key + np.linspace(0, 30, kv_len)[:, None] * along_query
        case "falling":
            key = 0.3 * key + np.linspace(30, 0, kv_len)[:, None] * along_query
        case "positive values":
            value = np.abs(value) + 0.5
        case "values near the limit":
            value *= min(fmt.max_finite / 8, 1e30)  # sums of many stay finite in float32
        case "constant values":
            value[:] = value[0]
        case "coherent rounding":
            # Every weight but one is just above the middle between 1/2 and the next value of the format, and
            # the values have one sign: all roundings of P push the same way.
            logit = math.log(0.5 * (1 + 1.06 * fmt.unit_roundoff()))
            query[:], key[:], scale = 0.0, 0.0, 1.0
            query[:2] = 1.0
            key[1:, 0] = round_to(logit, fmt)
            key[1:, 1] = logit - key[1:, 0]
            value = np.abs(value) + 0.5
            value[0] = 0.0
        case "zero query":
            query[:] = 0.0
        case "integers":
            query = rng.integers(-3, 4, head_dim).astype(np.float64)
            key = rng.integers(-3, 4, key.shape).astype(np.float64)
            value = rng.integers(-8, 9, value.shape).astype(np.float64)
        case "tail at the underflow of P":
            key *= 0.01
            key[rng.integers(kv_len)] = 17 * along_query
            value = np.abs(value) + 0.5
    limit = fmt.max_finite / 4
    query, key, value = (round_to(np.clip(x, -limit, limit), fmt) for x in (query, key, value))
    return Problem(query, key, value, scale)

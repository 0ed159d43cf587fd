"""The budget against a scalar one written from docs/numerics.md, its limits, and a kernel that obeys it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from references.arithmetic_model import (
    AMPERE,
    BLACKWELL,
    HOPPER,
    INTERPRETER,
    PERMISSIVE,
    REFERENCE,
    ArithmeticModel,
)
from references.attention import attention, visible_keys
from references.error_bounds import LSE_TERMS, ORACLE_SHARE, TERMS, Budget, budget, overflow_free, tiling
from references.overflow import CLASSES, overflow_classes
from references.rounding import BFLOAT16, FLOAT16, FLOAT32, Format, as_format, round_to
from references.tiling import Tiles
from tests.value_families import FAMILIES, Family, Problem, draw

Float64Array = NDArray[np.float64]
LN2, LOG2E = math.log(2), math.log2(math.e)


def gate(problem: Problem, fmt: Format | str, model: ArithmeticModel, tiles: Tiles, **options: Any) -> Budget:
    visible = np.ones((1, len(problem.key)), dtype=np.bool_)
    inputs = (problem.query[None, None], problem.key[None], problem.value[None], visible)
    return budget(*inputs, scale=problem.scale, fmt=fmt, model=model, tiles=tiles, **options)


# A budget of one query, term by term, with loops over keys.


def expected_terms(
    p: Problem, fmt: Format, model: ArithmeticModel, tiles: Tiles
) -> tuple[dict[str, list[float]], dict[str, float], list[float]]:
    u, n, d = 2.0**-24, len(p.key), len(p.query)
    fused = model.accumulator == "fused" and fmt.precision <= 11
    flushed = model.flush_to_zero or fused
    floor = 2.0**-126 if flushed else 2.0**-149
    exp_floor = 2.0**-126 if model.exp2_flushes else 2.0**-149 * max(1.0, model.exp2_error * 2.0**23)
    step = (1 + (model.fused_products + 1) * 2.0**-model.fused_fraction_bits) * (1 + 2.0**-23) - 1

    def gamma(count: int, unit: float = u) -> float:
        return count * unit / (1 - count * unit)

    def lifted(x: float) -> float:
        return max(abs(x), fmt.smallest_normal) if fused and x else abs(x)

    wide = 2 * fmt.precision > 24 and not fused
    g_qk = gamma(math.ceil(d / model.fused_products), step) if fused else gamma(d - 1)
    g_qk = (1 + g_qk) * (1 + u) - 1 if wide else g_qk
    c = abs(p.scale) * LOG2E
    theta = model.scale_error + (2 * floor / c if 0 < c < 2.0**-125 else 0.0)
    t, r = [], []
    for key in p.key:
        t.append(sum(float(a) * float(b) for a, b in zip(p.query, key, strict=True)) * p.scale * LOG2E)
        a = sum(lifted(x) * lifted(y) for x, y in zip(p.query, key, strict=True))
        delta = g_qk * a + (1 + g_qk) * 2 * d * floor
        r.append(c * (1 + theta) * (1 + u) * delta + u * (1 + theta) * abs(t[-1]) + floor)
    top = max(t)
    gap = [top - x for x in t]
    total = sum(2.0**-x for x in gap)
    w = [2.0**-x / total for x in gap]

    # Which tiles can raise the running maximum, and how many exponentials a key's weight passes.
    exps, rescales, split_maxima = [1] * n, 0, []
    tau_of = [x / (1 - theta) for x in r]
    for split in tiles:
        records = []
        low = -math.inf
        for start, stop in split:
            keys = range(start, stop)
            records.append(low > -math.inf and max(t[j] + tau_of[j] for j in keys) > low)
            low = max(low, *(t[j] - tau_of[j] for j in keys))
        rescales = max(rescales, sum(records))
        for index, (start, stop) in enumerate(split):
            for j in range(start, stop):
                exps[j] += sum(records[index + 1 :])
        keys = range(split[0][0], split[-1][1])
        split_maxima.append((max(t[j] + tau_of[j] for j in keys), max(t[j] - tau_of[j] for j in keys)))

    def merging(maxima: list[tuple[float, float]]) -> tuple[list[int], int]:
        raises = [i > 0 and maxima[i][0] > max(low for _, low in maxima[:i]) for i in range(len(maxima))]
        if len(maxima) == 1:
            return [0], 0
        return [1 + sum(raises[i + 1 :]) for i in range(len(maxima))], 1 + sum(raises)

    size = 4 if model.merge == "grouped" else len(tiles)
    groups = [split_maxima[i : i + size] for i in range(0, len(tiles), size)]
    inside = [merging(group) for group in groups]
    among = merging([(max(high for high, _ in group), max(low for _, low in group)) for group in groups])
    merge_rescales = max(count for _, count in inside) + among[1]
    for index, split in enumerate(tiles):
        for j in range(split[0][0], split[-1][1]):
            exps[j] += inside[index // size][0][index % size] + among[0][index // size]

    tau = [r[j] + theta * gap[j] for j in range(n)]
    exponent = [
        LN2 * (tau[j] + u * (gap[j] + tau[j] + (3 if model.contraction else 1) * max(tau)))
        - exps[j] * math.log1p(-model.exp2_error)
        for j in range(n)
    ]
    phi = [math.expm1(x) for x in exponent]

    widths = [[stop - start for start, stop in split] for split in tiles]
    rescaling = gamma(rescales + merge_rescales + len(tiles) - 1)
    tile_keys, split_tiles = max(max(x) for x in widths), max(len(x) for x in widths)
    split_keys = max(sum(x) for x in widths)
    if fused:
        assert model.carried
        per_tile = [[math.ceil(x / model.fused_products) for x in split] for split in widths]
        g = gamma(max(sum(x) for x in per_tile), step)
    else:
        g = gamma(split_keys - 1 if model.carried else tile_keys + split_tiles - 2)
    g = (1 + g) * (1 + u) - 1 if wide else g
    g = (1 + g) * (1 + rescaling) - 1
    lam = (1 + gamma(min(tile_keys + split_tiles - 2, split_keys - 1))) * (1 + rescaling) - 1
    u_p, eta_p = (
        (fmt.unit_roundoff(model.p_rounding), fmt.underflow_error(model.p_rounding))
        if fmt.precision < 24
        else (0.0, 0.0)
    )
    rel_p = [min(1.0, max(u_p, eta_p * 2.0 ** min(gap[j], 500.0))) if u_p else 0.0 for j in range(n)]
    operations = 2 * n + 4 * split_tiles * len(tiles) + 2
    lost_sum = 2 * exp_floor * n + operations * floor

    names = ("logit", "P", "accumulation", "sum", "underflow", "division", "output rounding", "oracle")
    terms: dict[str, list[float]] = {name: [] for name in names}
    cancellation = []
    for i in range(d):
        o = sum(w[j] * p.value[j, i] for j in range(n))
        v = [abs(float(x)) for x in p.value[:, i]]
        mass = sum(w[j] * (1 + phi[j]) for j in range(n))
        share = sum(w[j] * phi[j] for j in range(n))
        centred = math.sqrt(share * sum(w[j] * phi[j] * (p.value[j, i] - o) ** 2 for j in range(n)))
        cancellation.append(share * (abs(o) + sum(w[j] * phi[j] * v[j] for j in range(n)) / share) * 2.0**-22)
        lost = 2 * exp_floor * sum(v) + operations * floor
        den = 1 - share - lam * mass - lost_sum / total
        now = {
            "logit": centred / den,
            "P": sum(w[j] * (1 + phi[j]) * rel_p[j] * v[j] for j in range(n)) / den,
            "accumulation": g * sum(w[j] * (1 + phi[j]) * (1 + rel_p[j]) * lifted(v[j]) for j in range(n)) / den,
            "sum": lam * mass * abs(o) / den,
            "underflow": (lost + lost_sum * abs(o)) / total / den,
        }
        before = abs(o) + sum(now.values())
        now["underflow"] += floor
        now["division"] = before * model.division_error
        quotient = before * (1 + model.division_error) + floor
        spacing = max(math.floor(math.log2(quotient)), fmt.emin) - fmt.precision + 1
        now["output rounding"] = 2.0**spacing / 2 if fmt.precision < 24 else 0.0
        now["oracle"] = ORACLE_SHARE * sum(now.values())
        for name, x in now.items():
            terms[name].append(x)

    mean = sum(w[j] * math.exp(exponent[j]) for j in range(n))
    lse = {"logit": LN2 * theta * abs(top) + math.log(mean), "P": 0.0}
    lse["sum"] = -math.log1p(-lam)
    lse["underflow"] = 2 * lost_sum
    error = sum(lse.values())
    lse["logarithm"] = model.log2_error * (LN2 + math.log(total) + error)
    reach = max(tau) + theta * abs(top)
    level = LN2 * (abs(top) + reach) + math.log(total) + error + lse["logarithm"]
    lse["rounding"] = 4 * u * (1 + 4 * u) * level + floor
    lse["oracle"] = ORACLE_SHARE * sum(lse.values())
    return terms, lse, cancellation


ONE_TILE = tiling(9, 0, 16)
MANY = tiling(7, 2, 2, 4)
GROUPS = tiling(9, 0, 1, 1)


@pytest.mark.parametrize("tiles", [ONE_TILE, MANY, GROUPS], ids=["one tile", "splits", "groups of splits"])
@pytest.mark.parametrize("fmt", [FLOAT16, BFLOAT16, FLOAT32], ids=lambda f: f.name)
@pytest.mark.parametrize("model", [INTERPRETER, AMPERE, HOPPER], ids=lambda m: m.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_term_equals_the_scalar_derivation(
    family: Family, model: ArithmeticModel, fmt: Format, tiles: Tiles
) -> None:
    problem = draw(family, 9, 8, fmt, 1)
    terms, lse_terms, cancellation = expected_terms(problem, fmt, model, tiles)

    ours = gate(problem, fmt, model, tiles)

    assert tuple(ours.terms) == TERMS == tuple(terms)
    assert tuple(ours.lse_terms) == LSE_TERMS == tuple(lse_terms)
    for name in TERMS:
        # The variance of values that all but one key lacks weight for is a difference of equal numbers.
        slack = np.array(cancellation) if name == "logit" else 0.0
        expected = np.array(terms[name])
        assert np.all(np.abs(ours.terms[name][0, 0] - expected) <= slack + 1e-3 * expected), name
    for name in LSE_TERMS:
        assert ours.lse_terms[name][0, 0] == pytest.approx(lse_terms[name], rel=1e-3, abs=1e-300), name
    assert np.array_equal(ours.out, sum(ours.terms.values()))
    assert np.array_equal(ours.lse, sum(ours.lse_terms.values()))
    for term in (*ours.terms.values(), *ours.lse_terms.values()):
        assert np.all(term >= 0)


def test_a_batch_of_heads_and_queries_equals_one_query_at_a_time() -> None:
    rng = np.random.default_rng(4)
    query, key, value = (round_to(rng.standard_normal(s), FLOAT16) for s in ((6, 5, 8), (2, 11, 8), (2, 11, 8)))
    visible = visible_keys(5, 11, True)
    tiles = tiling(6, 5, 4)

    for model in (INTERPRETER, HOPPER, PERMISSIVE):
        for alarm_lambda in (None, 6.0):
            options: dict[str, Any] = {"scale": 0.3, "fmt": "float16", "model": model}
            options |= {"tiles": tiles, "alarm_lambda": alarm_lambda}
            whole = budget(query, key, value, visible, **options)
            for h in range(6):
                for i in range(5):
                    one = budget(
                        query[h : h + 1, i : i + 1],
                        key[h // 3 : h // 3 + 1],
                        value[h // 3 : h // 3 + 1],
                        visible[i : i + 1],
                        **options,
                    )
                    assert whole.out[h, i] == pytest.approx(one.out[0, 0], rel=1e-9)
                    assert whole.lse[h, i] == pytest.approx(one.lse[0, 0], rel=1e-9)


def test_a_scaled_query_in_the_subnormal_range_is_aligned_as_the_smallest_normal_number() -> None:
    # One key, so that lse is its logit. Scaled, every element of the query lies between 0 and the smallest number.
    head_dim, key = 256, 2.0**10
    model = dataclasses.replace(PERMISSIVE, scale_into_query=True)
    query = np.full(head_dim, FLOAT16.smallest_normal)
    problem = Problem(query, np.full((1, head_dim), key), np.ones((1, head_dim)), 2.0**-11 / LOG2E)

    allowed = gate(problem, FLOAT16, model, tiling(1, 0, 16)).lse[0, 0]

    steps = head_dim / model.fused_products
    rounding = head_dim * FLOAT16.underflow_error() * key
    alignment = steps * model.fused_step_error() * head_dim * FLOAT16.smallest_normal * key
    assert allowed >= LN2 * (rounding + alignment)


def float32_kernel(p: Problem, fmt: Format, tiles: Tiles) -> tuple[Float64Array, float]:
    """Online softmax in float32, one tile after the other, splits merged at the end."""
    f32 = np.float32
    query, key, value = (x.astype(f32) for x in (p.query, p.key, p.value))
    constant = f32(p.scale * LOG2E)
    partials = []
    for split in tiles:
        m, total, acc = f32(-np.inf), f32(0), np.zeros(value.shape[1], f32)
        for start, stop in split:
            t = (key[start:stop] @ query) * constant
            higher = max(m, t.max())
            shrink, weights = np.exp2(m - higher), np.exp2(t - higher)
            total = total * shrink + weights.sum(dtype=f32)
            rounded = round_to(weights, fmt).astype(f32) if fmt.precision < 24 else weights
            acc = acc * shrink + rounded @ value[start:stop]
            m = higher
        partials.append((m, total, acc))
    m = max(x[0] for x in partials)
    total = f32(sum(x[1] * np.exp2(x[0] - m) for x in partials))
    acc = sum((x[2] * np.exp2(x[0] - m) for x in partials), start=np.zeros(value.shape[1], f32))
    lse = f32(f32(m + np.log2(total)) * f32(LN2))
    return round_to(acc / total, fmt), float(lse)


@pytest.mark.parametrize("fmt", [FLOAT16, BFLOAT16, FLOAT32], ids=lambda f: f.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_float32_kernel_stays_within_the_gate(family: Family, fmt: Format) -> None:
    for kv_len, head_dim, tiles in (
        (1, 2, tiling(0, 1, 16)),
        (17, 16, tiling(16, 1, 16)),
        (100, 64, tiling(96, 4, 16, 32)),
        (700, 16, tiling(700, 0, 64)),
    ):
        problem = draw(family, kv_len, head_dim, fmt, 2)
        out, lse = attention(
            problem.query[None, None],
            problem.key[None],
            problem.value[None],
            is_causal=False,
            scale=problem.scale,
        )
        with np.errstate(under="ignore", over="ignore"):
            kernel_out, kernel_lse = float32_kernel(problem, fmt, tiles)
        allowed = gate(problem, fmt, INTERPRETER, tiles)

        assert np.isfinite(allowed.out).all()
        assert np.all(np.abs(kernel_out - out[0, 0]) <= allowed.out[0, 0])
        assert abs(kernel_lse - lse[0, 0]) <= allowed.lse[0, 0]


@pytest.mark.parametrize("fmt", [FLOAT16, BFLOAT16], ids=lambda f: f.name)
def test_the_gate_is_nearly_attained(fmt: Format) -> None:
    tiles = tiling(700, 0, 64)
    used = []
    for seed in range(8):
        problem = draw("coherent rounding", 700, 32, fmt, seed)
        weights = np.exp(problem.key @ problem.query * problem.scale)
        exact = weights @ problem.value / weights.sum()
        out, _ = float32_kernel(problem, fmt, tiles)
        used.append(np.abs(out - exact) / gate(problem, fmt, INTERPRETER, tiles).out[0, 0])

    assert 0.9 < np.max(used) <= 1


@pytest.mark.parametrize("model", [INTERPRETER, HOPPER, PERMISSIVE], ids=lambda m: m.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_alarm_never_exceeds_the_gate(family: Family, model: ArithmeticModel) -> None:
    problem = draw(family, 60, 8, BFLOAT16, 0)
    tiles = tiling(60, 0, 16)

    alarm = gate(problem, "bfloat16", model, tiles, alarm_lambda=6.0)
    allowed = gate(problem, "bfloat16", model, tiles)

    assert np.all(alarm.out <= allowed.out)
    assert np.all(alarm.lse <= allowed.lse)
    assert np.all(alarm.out > 0)


def test_the_alarm_is_much_sharper_than_the_gate_at_length() -> None:
    problem = draw("normal", 1000, 64, BFLOAT16, 0)
    tiles = tiling(1000, 0, 64)

    alarm = gate(problem, "bfloat16", INTERPRETER, tiles, alarm_lambda=6.0)
    allowed = gate(problem, "bfloat16", INTERPRETER, tiles)

    assert np.median(alarm.out / allowed.out) < 0.6


@pytest.mark.parametrize(
    "worse",
    [
        {"exp2_error": 2.0**-18},
        {"scale_error": 2.0**-18},
        {"division_error": 2.0**-12},
        {"p_rounding": "toward_zero"},
        {"output_rounding": "toward_zero"},
        {"p_format": "float8_e4m3fn"},
        {"accumulator": "fused", "fused_products": 4, "fused_fraction_bits": 13, "carried": True},
        {"contraction": True},
        {"merge": "lse"},
        {"merge": "lse", "partial_format": "bfloat16"},
        {"merge": "lse twice"},
        {"merge": "lse twice", "partial_format": None},
        {"scale_into_query": True},
    ],
    ids=str,
)
def test_a_less_accurate_model_has_a_larger_budget(worse: dict[str, Any]) -> None:
    problem = draw("normal", 40, 16, BFLOAT16, 0)
    tiles = tiling(40, 0, 8, 16)

    better = gate(problem, "bfloat16", INTERPRETER, tiles)
    larger = gate(problem, "bfloat16", dataclasses.replace(INTERPRETER, **worse), tiles)

    assert np.all(larger.out >= better.out)
    assert larger.out.sum() + larger.lse.sum() > better.out.sum() + better.lse.sum()


@pytest.mark.parametrize(("worse", "term"), [({"tf32": True}, "logit"), ({"flush_to_zero": True}, "underflow")])
def test_tf32_and_flushing_cost_what_they_should(worse: dict[str, Any], term: str) -> None:
    problem = draw("normal", 40, 16, FLOAT32, 0)
    model = dataclasses.replace(INTERPRETER, **worse)

    better = gate(problem, "float32", INTERPRETER, tiling(40, 0, 8))
    larger = gate(problem, "float32", model, tiling(40, 0, 8))

    assert np.all(larger.terms[term] > 100 * better.terms[term])


def test_a_row_sum_of_rounded_weights_centres_the_rounding_of_p() -> None:
    problem = draw("constant values", 40, 16, BFLOAT16, 0)
    tiles = tiling(40, 0, 8)

    apart = gate(problem, "bfloat16", INTERPRETER, tiles)
    together = gate(problem, "bfloat16", dataclasses.replace(INTERPRETER, row_sum_from_p=True), tiles)

    assert np.all(apart.terms["P"] > 0)
    assert np.all(together.terms["P"] == 0)
    assert np.all(together.terms["logit"] < 1e-6 * np.abs(problem.value[0]))
    assert together.lse[0, 0] > 100 * apart.lse[0, 0]


def test_the_budget_is_equivariant_under_powers_of_two() -> None:
    problem = draw("normal", 30, 8, FLOAT32, 0)
    scaled = Problem(problem.query, problem.key, problem.value * 2.0**20, problem.scale)
    moved = Problem(problem.query * 4, problem.key, problem.value, problem.scale / 4)

    plain = gate(problem, "float32", INTERPRETER, tiling(30, 0, 8))

    assert gate(scaled, "float32", INTERPRETER, tiling(30, 0, 8)).out == pytest.approx(plain.out * 2.0**20)
    assert gate(moved, "float32", INTERPRETER, tiling(30, 0, 8)).out == pytest.approx(plain.out)
    assert gate(moved, "float32", INTERPRETER, tiling(30, 0, 8)).lse == pytest.approx(plain.lse)


def test_more_splits_and_tiles_cost_more() -> None:
    problem = draw("normal", 64, 8, FLOAT32, 0)

    one = gate(problem, "float32", INTERPRETER, tiling(64, 0, 64))
    tiles = gate(problem, "float32", INTERPRETER, tiling(64, 0, 4))
    splits = gate(problem, "float32", INTERPRETER, tiling(64, 0, 4, 16))

    assert np.all(one.terms["logit"] < tiles.terms["logit"])
    assert np.all(splits.terms["logit"] > one.terms["logit"])


def test_unknown_groups_of_splits_may_be_rescaled_once_for_every_other_split() -> None:
    """By hand, of 4 splits of one key each, whose logits are so close that any may be the largest: a key passes its own
    exponential and, merged in order, one and one for each later split: 3.5 on average; in unknown groups 1 + 5."""
    nothing, value = np.zeros((1, 4, 1)), np.array([1.0, -1.0, 1.0, -1.0])[None, :, None]
    model = dataclasses.replace(INTERPRETER, exp2_error=2.0**-12)

    def logit(merge: Any) -> float:
        exact = dataclasses.replace(model, merge=merge, log2_error=0.0)
        seen = np.ones((1, 4), bool)
        options: dict[str, Any] = {"scale": 1.0, "fmt": "float32", "model": exact, "tiles": tiling(4, 0, 1, 1)}
        return float(budget(nothing[:, :1], nothing, value, seen, **options).terms["logit"].item())

    assert logit("lse") == pytest.approx(3.5 * 2.0**-12, rel=0.01)
    assert logit("lse twice") == pytest.approx(6 * 2.0**-12, rel=0.01)


def test_a_query_that_sees_nothing_has_budget_zero() -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal(s) for s in ((2, 3, 4), (1, 2, 4), (1, 2, 4)))
    options: dict[str, Any] = {"scale": 1.0, "fmt": "float16", "model": HOPPER}

    part = budget(query, key, value, visible_keys(3, 2, True), tiles=tiling(0, 2, 16), **options)
    none = budget(query, key[:, :0], value[:, :0], np.ones((3, 0), bool), tiles=tiling(0, 0, 16), **options)

    assert np.all(part.out[:, 0] == 0)
    assert np.all(part.lse[:, 0] == 0)
    assert np.all(part.out[:, 1:] > 0)
    assert np.all(none.out == 0)
    assert none.out.shape == (2, 3, 4)
    assert set(none.terms) == set(TERMS)


def test_bad_inputs_take_the_bound_only_from_what_sees_them() -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal(s) for s in ((2, 3, 4), (1, 3, 4), (1, 3, 4)))
    options: dict[str, Any] = {"scale": 1.0, "fmt": "float16", "model": HOPPER, "tiles": tiling(0, 3, 16)}
    causal = visible_keys(3, 3, True)
    key[0, 2, 1] = np.nan
    value[0, 1, 3] = np.inf

    bounds = budget(query, key, value, causal, **options)
    free = overflow_free(query, key, value, causal, scale=1.0, fmt="float16", model=HOPPER)

    unbounded = [[False] * 4, [False, False, False, True], [True] * 4]
    assert np.isnan(bounds.out).tolist() == [unbounded] * 2
    assert np.isnan(bounds.lse).tolist() == [[False, False, True]] * 2
    assert free.tolist() == [[True, False, False]] * 2


def test_a_query_that_is_no_number_is_seen_where_subnormal_operands_are_lifted() -> None:
    query, key, value = np.ones((2, 1, 4)), np.ones((1, 3, 4)), np.ones((1, 3, 4))
    query[1, 0, 2] = np.nan
    options: dict[str, Any] = {"scale": 1.0, "fmt": "float16", "model": HOPPER, "tiles": tiling(3, 0, 16)}

    bounds = budget(query, key, value, visible_keys(1, 3, True), **options)

    assert bounds.overflow_free.tolist() == [[True], [False]]
    assert np.isnan(bounds.out[:, 0]).tolist() == [[False] * 4, [True] * 4]


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-40, 1e-38, -1e-40, 1e4, -1e6, 1e30])
@pytest.mark.parametrize("model", [INTERPRETER, AMPERE, HOPPER, BLACKWELL, PERMISSIVE, REFERENCE], ids=lambda m: m.name)
def test_every_scale_has_a_finite_budget(model: ArithmeticModel, scale: float) -> None:
    problem = dataclasses.replace(draw("normal", 20, 8, BFLOAT16, 0), scale=scale)
    fmt = "float64" if model is REFERENCE else "bfloat16"

    for alarm_lambda in (None, 6.0):
        bounds = gate(problem, fmt, model, tiling(20, 0, 8, 8), alarm_lambda=alarm_lambda)
        assert np.isfinite(bounds.out).all()
        assert np.isfinite(bounds.lse).all()


def test_a_scale_that_a_device_flushes_to_zero_is_within_the_budget() -> None:
    # Large scores times a constant that is subnormal in float32: t is 2, or 0 where the constant is flushed.
    query, key = np.array([2.0**63, 0.0]), np.array([[2.0**62, 0.0], [0.0, 0.0]])
    problem = Problem(query, key, np.array([[1.0, 0.0], [0.0, 1.0]]), 2.0**-127)
    out, lse = attention(query[None, None], key[None], problem.value[None], is_causal=False, scale=2.0**-127)

    kept = gate(problem, "float32", INTERPRETER, tiling(2, 0, 16))
    flushed = gate(problem, "float32", HOPPER, tiling(2, 0, 16))

    assert np.all(np.abs(out[0, 0] - 0.5) <= flushed.out[0, 0])
    assert abs(lse[0, 0] - math.log(2)) <= flushed.lse[0, 0]
    assert np.all(np.abs(out[0, 0] - 0.5) > kept.out[0, 0])


def test_a_constant_that_may_be_flushed_says_nothing_about_which_tile_raises_the_maximum() -> None:
    problem = dataclasses.replace(draw("falling", 16, 8, FLOAT32, 0), scale=1e-40)

    one = gate(problem, "float32", HOPPER, tiling(16, 0, 16))
    many = gate(problem, "float32", HOPPER, tiling(16, 0, 1))

    assert np.all(many.terms["logit"] > 4 * one.terms["logit"])


def test_weights_below_the_format_of_p_cost_no_more_than_themselves() -> None:
    # 1 key at weight 1 and many at 2**-40, far below what float16 can hold.
    n = 2000
    query, key = np.array([1.0, 0.0]), np.zeros((n, 2))
    key[1:, 0] = -40 * LN2
    problem = Problem(query, round_to(key, FLOAT16), np.ones((n, 2)), 1.0)

    bounds = gate(problem, "float16", INTERPRETER, tiling(n, 0, 64))

    at_subnormal_error_each = n * FLOAT16.underflow_error()
    assert np.all(bounds.terms["P"] < 2 * FLOAT16.unit_roundoff())
    assert np.all(bounds.terms["P"] - FLOAT16.unit_roundoff() < 0.01 * at_subnormal_error_each)


@pytest.mark.parametrize("fmt", [FLOAT16, BFLOAT16], ids=lambda f: f.name)
def test_lengths_of_32768_keys_have_a_useful_budget(fmt: Format) -> None:
    problem = draw("positive values", 32768, 16, fmt, 0)

    for model in (INTERPRETER, AMPERE, HOPPER):
        bounds = gate(problem, fmt, model, tiling(32768, 0, 64, 4096))
        assert np.all(bounds.out < 4 * fmt.unit_roundoff())


# Overflow.

BF16_NEAR_LIMIT = 2.0**126


def classes_of(problem: Problem, fmt: str = "bfloat16", model: ArithmeticModel = HOPPER) -> tuple[set[str], bool]:
    visible = np.ones((1, len(problem.key)), dtype=np.bool_)
    inputs = (problem.query[None, None], problem.key[None], problem.value[None], visible)
    classes = overflow_classes(*inputs, scale=problem.scale, fmt=fmt, model=model)
    free = overflow_free(*inputs, scale=problem.scale, fmt=fmt, model=model)
    assert tuple(classes) == CLASSES
    return {name for name, reached in classes.items() if reached[0, 0]}, bool(free[0, 0])


def case(q: float = 1.0, k: float = 1.0, v: float = 1.0, scale: float = 1.0, n: int = 4) -> Problem:
    return Problem(np.array([q, q]), np.full((n, 2), k), np.full((n, 2), v), scale)


@pytest.mark.parametrize(
    ("problem", "classes"),
    [
        (case(), set()),
        (case(v=math.inf), {"input"}),
        (case(q=2.0**63, k=2.0**63, scale=2.0**-120), {"score"}),
        (case(q=2.0**50, k=2.0**50, scale=2.0**30), {"logit", "contraction"}),
        (case(scale=2.0**128, q=0.0), {"logit"}),
        (case(q=2.0**13, k=2.0**12), {"contraction"}),
        (case(v=BF16_NEAR_LIMIT / 4, n=16), {"numerator"}),
        (case(v=as_format("bfloat16").max_finite, n=1), {"numerator", "output"}),
    ],
    ids=lambda x: "+".join(sorted(x)) or "free" if isinstance(x, set) else "",
)
def test_each_way_to_overflow_has_its_class(problem: Problem, classes: set[str]) -> None:
    assert classes_of(problem) == (classes, not classes)


def test_without_contraction_large_logits_are_safe() -> None:
    assert classes_of(case(q=2.0**13, k=2.0**12), model=INTERPRETER) == (set(), True)


def test_a_mean_can_be_finite_while_its_numerator_is_not() -> None:
    # 16 equal weights of 1 on values of 2**124: the sum is 2**128, the mean 2**124.
    problem = case(v=BF16_NEAR_LIMIT / 4, n=16)

    with np.errstate(over="ignore", invalid="ignore"):
        out, _ = float32_kernel(problem, BFLOAT16, tiling(16, 0, 16))
        fewer, _ = float32_kernel(case(v=BF16_NEAR_LIMIT / 4, n=3), BFLOAT16, tiling(3, 0, 16))

    assert np.isinf(out).all()
    assert classes_of(case(v=BF16_NEAR_LIMIT / 4, n=3)) == (set(), True)
    assert np.isfinite(fewer).all()


def test_float16_outputs_near_the_limit_are_not_promised() -> None:
    assert classes_of(case(v=65504.0), "float16") == ({"output"}, False)
    assert classes_of(case(v=64000.0), "float16") == (set(), True)


def test_a_query_without_keys_is_free_of_overflow() -> None:
    query, key, value = np.full((1, 2, 2), np.nan), np.full((1, 1, 2), np.nan), np.full((1, 1, 2), np.nan)

    free = overflow_free(query, key, value, visible_keys(2, 1, True), scale=1.0, fmt="float16", model=INTERPRETER)

    assert free.tolist() == [[True, False]]


# Tilings and models.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 0, 16), ((),)),
        ((0, 3, 2), (((0, 2), (2, 3)),)),
        ((5, 3, 2, 4), (((0, 2), (2, 4)), ((4, 5), (5, 7), (7, 8)))),
        ((8, 1, 4, 4), (((0, 4),), ((4, 8), (8, 9)))),
        ((8, 0, 4), (((0, 4), (4, 8)),)),
    ],
)
def test_tiles_start_anew_with_the_new_tokens_and_with_every_split(arguments: tuple[int, ...], expected: Tiles) -> None:
    assert tiling(*arguments) == expected


@pytest.mark.parametrize("splits", [1, 3], ids=["one split", "several splits"])
def test_a_tile_visited_before_its_turn_is_bounded_like_its_keys_moved_there(splits: int) -> None:
    problem = draw("normal", 25, 2, BFLOAT16, 0)
    in_order = tiling(24, 0, 4, 24 // splits)
    first = (((24, 25), *in_order[0]), *in_order[1:])
    rolled = dataclasses.replace(problem, key=np.roll(problem.key, 1, axis=0), value=np.roll(problem.value, 1, axis=0))
    shifted = [tuple((a + 1, b + 1) for a, b in split) for split in in_order]
    moved = (((0, 1), *shifted[0]), *shifted[1:])

    early = gate(problem, "bfloat16", HOPPER, first)
    same = gate(rolled, "bfloat16", HOPPER, moved)
    late = gate(problem, "bfloat16", HOPPER, (*in_order[:-1], (*in_order[-1], (24, 25))))

    np.testing.assert_allclose(early.out, same.out, rtol=1e-12)
    np.testing.assert_allclose(early.lse, same.lse, rtol=1e-12)
    assert (early.out != late.out).any()


def test_impossible_tilings_are_refused() -> None:
    with pytest.raises(ValueError) as tile:
        tiling(4, 0, 0)
    with pytest.raises(ValueError) as split:
        tiling(4, 0, 2, 3)
    with pytest.raises(ValueError) as uncovered:
        gate(draw("normal", 5, 2, FLOAT16, 0), "float16", HOPPER, tiling(4, 0, 2))

    assert str(tile.value) == "block_n must be at least 1, got 0"
    assert str(split.value) == "kv_split_size must be a positive multiple of block_n=2, got 3"
    assert str(uncovered.value) == "tiles must cover each of the keys [0, 5) once, got (((0, 2), (2, 4)),)"
    assert gate(draw("normal", 4, 2, FLOAT16, 0), "float16", HOPPER, tiling(4, 0, 2)).out.shape == (1, 1, 2)


@pytest.mark.parametrize("model", [INTERPRETER, AMPERE, HOPPER, BLACKWELL, PERMISSIVE, REFERENCE], ids=lambda m: m.name)
def test_a_model_survives_its_json(model: ArithmeticModel) -> None:
    assert ArithmeticModel.from_json(model.to_json()) == model
    of_input = dataclasses.replace(model, partial_format=None)
    assert ArithmeticModel.from_json(of_input.to_json()) == of_input
    assert model.provenance


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"carried": true', '"carried": 1'),
        ('"fused_products": 16', '"fused_products": true'),
        ('"fused_products": 16', '"fused_products": 0'),
        ('"merge": "grouped"', '"merge": "sum"'),
        ('"work_format": "float32"', '"work_format": "float31"'),
        ('"tf32": false,', ""),
        ('"tf32": false', '"tf64": false'),
        ('"exp2_error": "', '"exp2_error": "-'),
        ('"p_format": null', '"p_format": 3'),
        ('"partial_format": "float32"', '"partial_format": 3'),
    ],
)
def test_a_model_file_that_is_not_one_is_refused(old: str, new: str) -> None:
    text = HOPPER.to_json()
    assert old in text

    with pytest.raises(ValueError):
        ArithmeticModel.from_json(text.replace(old, new))


def test_a_model_file_must_be_an_object() -> None:
    with pytest.raises(ValueError) as error:
        ArithmeticModel.from_json("[]")

    assert str(error.value) == "an arithmetic model must be a JSON object, got list"

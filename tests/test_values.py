"""The numbers of a case are the same bits everywhere, and each family does what it is for."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from properties.case import DTYPES, FAMILIES, Case, Row
from properties.schedule import digest, initial_cache, plan
from properties.values import FAMILY_OF, LATTICE_RANGE, Float64Array
from references.lattice import lattice_scale
from references.rounding import as_format, decode, round_to

CASE = Case(
    rows=(Row(cached=33, new=(2,), uid=3), Row(cached=16, new=(1,), uid=4)),
    num_kv_heads=2,
    group_size=3,
    head_dim=16,
    start="tuple",
    capacity=35,
    cache_max_len=35,
    seed=5,
)
# SHA-256, first 16 digits. A change here is a new GENERATOR_VERSION: every stored case means other numbers.
DIGESTS = {
    "zeros": ("2c66bf97884e1ba4", "02bf1a45d6496d7a", "02bf1a45d6496d7a"),
    "ones": ("a53e3a6f19615669", "f84de7dca63a0511", "23dcee4e36b3ee24"),
    "iota": ("1924d80576140105", "e7f5b2d2841150d5", "3b12267a546e1aa8"),
    "integers": ("cec01b3aac94c657", "589c1d634b01974d", "d8b6aeb526590405"),
    "lattice": ("172e9ebee5aadbf8", "b82c77c39dd5b528", "c8aeb16f1c81b2e4"),
    "one_hot": ("ac896e86799c115a", "149bec6f09a237c4", "5301d59aefac95f8"),
    "normal": ("761f318305b63636", "d8b376976270c144", "0ebd7f11196a81cd"),
    "constant_values": ("57dc15566f404316", "fde6a694e4c1dadc", "2bbe02518d454e25"),
    "negative_logits": ("dee71c7a4377dd19", "054f6af8a03e552e", "b752de7a92670df3"),
    "large_logits": ("a09899c33ea4569a", "c1f4d8a64a3aab0c", "6547ce06eefc3b87"),
    "score_range": ("9d50c174f121577e", "7b5c7e58018f967b", "cb3afc310734ee81"),
    "rising": ("146007daa9b1450e", "213c0ffc1e322b23", "f6668bb6459d26ce"),
    "falling": ("ea40b6014436db8a", "2a7e8e185ddfd73a", "f3f143ee3195260f"),
    "near_ties": ("50a7a62541a3773a", "75e54e2636533b2c", "d249fdcdda77add9"),
    "dynamic_range": ("b040aed4f949ab3f", "877880780265527b", "af3329d7662c152e"),
    "subnormal": ("cf47b3dd52872a92", "4c16a903014bb30d", "c633cca578a449bf"),
    "coherent": ("3e3dfaf71b7a6260", "9954efedbf88cb8c", "b46f98b0fe6721df"),
    "large_values": ("aaf187aae93e9acc", "efb6e8ff85b59081", "815d4065e4ed817c"),
}


def logits(case: Case) -> tuple[Float64Array, Float64Array]:
    """(q.k, values) of row 0 over what is cached: [num_q_heads, 2, 33] and [num_kv_heads, 33, head_dim]."""
    initial = initial_cache(case)
    assert initial is not None
    query = decode(plan(case)[0].query, case.dtype)[0]
    key, value = (decode(bits, case.dtype)[0, :, :33] for bits in (initial.key, initial.value))
    return query @ np.repeat(key, case.group_size, axis=0).transpose(0, 2, 1), value


def family(name: str, dtype: str, **fields: object) -> Case:
    return Case(**{**vars(CASE), "values": name, "dtype": dtype, **fields})


@pytest.mark.parametrize("name", FAMILIES)
def test_bits_are_the_stored_ones(name: str) -> None:
    assert tuple(digest(family(name, dtype))[:16] for dtype in DTYPES) == DIGESTS[name]


def test_every_family_has_its_numbers() -> None:
    assert tuple(FAMILY_OF) == FAMILIES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_are_finite_and_do_not_depend_on_the_rest_of_the_case(name: str, dtype: str) -> None:
    """Fewer tokens, rows and heads: what is left is what it was."""
    large = family(name, dtype)
    small = replace(large, rows=(Row(cached=17, new=(1,), uid=3),), num_kv_heads=1, capacity=17)
    whole, part = initial_cache(large), initial_cache(small)
    assert whole is not None
    assert part is not None

    assert np.isfinite(decode(whole.key, dtype)).all()
    assert np.isfinite(decode(whole.value, dtype)).all()
    assert np.isfinite(decode(plan(large)[0].query, dtype)).all()
    assert np.array_equal(whole.key[:1, :1, :17], part.key)
    assert np.array_equal(whole.value[:1, :1, :17], part.value)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"zeros", "ones", "iota"}))
def test_every_coordinate_matters(name: str) -> None:
    """Seed, uid, tensor, token, head: another one gives other values (or keys, where values are constant)."""
    case = family(name, "float32")
    initial = initial_cache(case)
    assert initial is not None
    tensor = "key" if name == "constant_values" else "value"
    bits = getattr(initial, tensor)

    assert not np.array_equal(bits[0, 0, :16], bits[1, 0, :16])
    assert not np.array_equal(bits[0, 0, :16], bits[0, 0, 16:32])
    assert not np.array_equal(bits[0, 0], getattr(initial_cache(replace(case, seed=6)), tensor)[0, 0])
    assert not np.array_equal(bits[0, 0], bits[0, 1])


def test_copied_heads_hold_the_same_numbers() -> None:
    initial = initial_cache(replace(CASE, values="normal", kv_head_copies=2))
    assert initial is not None

    assert np.array_equal(initial.key[:, 0], initial.key[:, 1])


def test_normal_has_the_moments_of_a_normal() -> None:
    """Standard errors of mean, variance and kurtosis of 2**19 numbers are 0.0014, 0.002 and 0.007."""
    case = Case(rows=(Row(new=(4096,)),), head_dim=128, values="normal", cache_max_len=4096)
    x = decode(plan(case)[0].value, "float32").ravel()

    assert abs(x.mean()) < 0.007
    assert abs(x.var() - 1.0208) < 0.01  # 4 * (2**16)**2 / 12 * (7 * 2**-18)**2
    assert abs((x**4).mean() / x.var() ** 2 - 2.7) < 0.04  # 3 - 6/5/4 for a sum of four uniforms
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.007


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 16, 80, 256])
def test_logits_lie_where_the_family_says(dtype: str, head_dim: int) -> None:
    scale = head_dim**-0.5
    z, _ = logits(family("negative_logits", dtype, head_dim=head_dim))
    assert (z * scale).max() < -1e4

    z, _ = logits(family("large_logits", dtype, head_dim=head_dim))
    assert (z * scale).min() > 88

    z, _ = logits(family("score_range", dtype, head_dim=head_dim))
    assert z.min() > 65504


@pytest.mark.parametrize("dtype", DTYPES)
def test_running_maximum_rises_and_falls(dtype: str) -> None:
    for name, sign in (("rising", 1), ("falling", -1)):
        z, _ = logits(family(name, dtype))
        tiles = z[:, :, :32].reshape(6, 2, 2, 16).max(axis=-1)
        assert (sign * (tiles[..., 1] - tiles[..., 0]) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_lattice_logits_are_integers_within_its_range(dtype: str) -> None:
    for j in range(4):
        z, values = logits(family("lattice", dtype, scale=lattice_scale(j)))
        t = z * 2.0**-j
        assert np.array_equal(t, np.rint(t))
        assert np.ptp(t, axis=-1).max() <= LATTICE_RANGE
        assert np.array_equal(values, np.rint(values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_hot_queries_find_their_key(dtype: str) -> None:
    """With 33 + 2 keys to choose from, at least half of the queries want a cached one and give it all weight."""
    case = family(
        "one_hot", dtype, head_dim=64, rows=(Row(cached=33, new=(30,), uid=3),), capacity=63, cache_max_len=63
    )
    z, _ = logits(case)
    ordered = np.sort(z * 64**-0.5, axis=-1)
    found = ordered[..., -1] == 64

    assert 0.3 < found.mean() < 0.9
    assert (ordered[..., -1] - ordered[..., -2])[found].min() >= 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_near_ties_differ_in_the_last_place(dtype: str) -> None:
    initial = initial_cache(family("near_ties", dtype))
    assert initial is not None
    key = decode(initial.key, dtype)[0, :, :33]

    spread = np.ptp(key, axis=1) / np.abs(key).max(axis=1)
    assert 0 < spread.max() <= 4 * 2.0 ** (1 - as_format(dtype).precision)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormals_are_subnormal(dtype: str) -> None:
    initial = initial_cache(family("subnormal", dtype))
    assert initial is not None

    for bits in (initial.key, initial.value):
        numbers = np.abs(decode(bits, dtype)[0, :, :33])
        assert numbers.min() > 0
        assert numbers.max() < as_format(dtype).smallest_normal


@pytest.mark.parametrize("dtype", DTYPES)
def test_coherent_weights_all_round_up_by_nearly_half_a_unit(dtype: str) -> None:
    z, values = logits(family("coherent", dtype, scale=1.0))
    weight = np.exp(z[..., 1:] - z[..., :1])
    rounded = round_to(weight, dtype)

    assert (rounded > weight).all()
    assert ((rounded - weight) / weight > 0.9 * as_format(dtype).unit_roundoff()).all()
    assert values[:, 1:].min() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_values_overflow_a_float32_sum_where_the_format_can(dtype: str) -> None:
    _, values = logits(family("large_values", dtype))

    assert np.abs(values).min() >= as_format(dtype).max_finite / 2
    assert (values[:, :, 0].sum(axis=1) > as_format("float32").max_finite).all() == (dtype != "float16")


def test_constant_values_are_the_same_for_every_token_and_row() -> None:
    initial = initial_cache(family("constant_values", "float32"))
    assert initial is not None

    assert (initial.value[:, :, :16] == initial.value[:1, :, :1]).all()


def test_gain_multiplies_queries_and_saturates() -> None:
    case = family("normal", "float16")
    query = decode(plan(case)[0].query, "float16")

    assert np.array_equal(decode(plan(replace(case, gain=3))[0].query, "float16"), query * 8)
    assert np.abs(decode(plan(replace(case, gain=30))[0].query, "float16")).max() == 65504


def test_stored_bits_are_not_of_this_machine() -> None:
    """The same numbers from Python's integers, for one element."""
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    state = mix(golden * (5 * 64 + 2 + 1) & mask)  # seed 5, tensor 2 (value)
    for coordinate in (3, (1 << 32) + 7, 0, 1, 9):  # uid, position, branch, head, dim
        state = mix(state + (coordinate + 1) * golden & mask)
    total = sum(state >> shift & 0xFFFF for shift in (0, 16, 32, 48))
    initial = initial_cache(family("normal", "float32"))
    assert initial is not None

    assert decode(initial.value, "float32")[0, 1, 7, 9] == np.float32(math.ldexp((total - 2 * 0xFFFF) * 7, -18))

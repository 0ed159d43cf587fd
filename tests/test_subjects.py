"""What can be put under test, and what the suite knows about flashcore's tiles."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, find, given, settings
from torch.nn.functional import scaled_dot_product_attention

from flashcore.fast import tuning
from properties import capabilities, laws, subjects
from properties.assertions import LawViolation
from properties.capabilities import Capabilities, NotOffered, Policy
from properties.case import Case, Row, Step
from properties.checking import check
from properties.guards import torch_dtype
from properties.strategies import cases
from properties.subjects import Subject, SubjectError, naive
from properties.subjects.adapter import Adapter, Call, as_subject
from properties.subjects.torch_sdpa import Flash, Math, TorchSDPA


def test_the_shipped_subject_loads_and_says_its_tiles_before_a_device_is_chosen() -> None:
    script = (
        "from properties.case import Case; from properties.subjects.flashcore import subject, tiles\n"
        "subject(); print(tiles(Case(), 1, 100, 1))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("os", "must be package.module:name or one of flashcore, "),
        ("os:", "got 'os:'"),
        ("a b:c", "must be package.module:name or one of "),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        ("properties.case:no_such", "and properties.case has no no_such"),
        ("properties.case:LAYOUTS", "must name a function"),
    ],
)
def test_a_specification_that_names_no_function_is_refused_in_one_line(spec: str, words: str) -> None:
    with pytest.raises(SubjectError) as refused:
        subjects.load(spec)

    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_a_module_offers_beside_its_function_is_used() -> None:
    found = subjects.load("properties.subjects.naive:attention_with_kv_cache")

    assert found.make_cache is naive.KVCache
    assert found.overflow_error is naive.CacheOverflowError
    assert found.allocators == (naive,)
    assert found.attention is naive.attention


@pytest.fixture
def flashcore() -> Subject:
    return subjects.load("flashcore")


@pytest.mark.parametrize("q_len", [1, 5, 200])
@pytest.mark.parametrize("cached", [0, 15, 16, 300, 1000])
def test_flashcore_visits_every_key_once_in_as_many_splits_as_it_plans(
    q_len: int, cached: int, flashcore: Subject
) -> None:
    case = Case(rows=(Row(cached, (q_len,)),), start="tuple", capacity=1200, block_n=32, kv_split_size=64)
    with flashcore.forced(case):
        splits = flashcore.tiles(case, q_len, cached, q_len)
        plan = tuning.plan(q_len=q_len, group_size=1, head_dim=case.head_dim, dtype=torch_dtype(case.dtype), block_n=32)

    new = (cached, cached + q_len)
    visited = [tile for split in splits for tile in split]
    if plan.path == "split":
        visited.remove(new)
        assert new == (splits[0][0] if q_len == 1 else splits[-1][-1])
        visited.append(new)
    assert [key for tile in visited for key in range(*tile)] == list(range(cached + q_len))
    assert len(splits) == plan.num_splits(cached)


@pytest.mark.parametrize(
    ("cached", "last"),
    [(0, [(0, 1)]), (5, [(0, 6)]), (64, [(0, 64), (64, 65)]), (100, [(0, 64), (64, 101)]), (300, [(256, 301)])],
)
def test_the_new_token_of_a_decode_step_on_hopper_has_its_place_in_the_last_tile(
    cached: int, last: list[tuple[int, int]], flashcore: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(
        rows=(Row(cached, (1,)),), start="tuple", capacity=1200, head_dim=128, dtype="float16", block_n=16,
        kv_split_size=128,
    )  # fmt: skip
    monkeypatch.setattr(tuning, "has_sm90_kernels", lambda _: True)

    with tuning.forced(path="split_sm90", kv_split_size=case.kv_split_size):
        splits = flashcore.tiles(case, 1, cached, 1)

    assert splits[-1] == tuple(last)
    assert [key for split in splits for tile in split for key in range(*tile)] == list(range(cached + 1))


def test_a_causal_call_without_a_cache_ends_in_the_diagonal(flashcore: Subject) -> None:
    case = Case(rows=(Row(50, (3,)),), op="attention", is_causal=True, block_n=16)

    assert flashcore.tiles(case, 3, 50, 0)[-1][-1] == (47, 50)


class NotAnAdapter:
    """A class that is something else."""


class Absent(Adapter):
    """An adapter to a package that is not installed."""

    name = "absent"
    capabilities = Capabilities()
    requires: ClassVar[dict[str, str]] = {"some-package": "some_package_that_does_not_exist"}


class Broken(Adapter):
    """An adapter whose package cannot be loaded."""

    name = "broken"
    capabilities = Capabilities()

    def __init__(self) -> None:
        """Fail like a library that is not there."""
        raise OSError("libkernel.so: cannot open shared object file\nsecond line")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NotAnAdapter", "must be an Adapter, or for --subject a function, and is none"),
        ("Absent", "needs some-package: python -m pip install some-package"),
        ("Broken", "cannot be used: OSError: libkernel.so: cannot open shared object file second line"),
    ],
)
def test_an_adapter_that_cannot_be_used_says_so_in_one_line(name: str, words: str) -> None:
    with pytest.raises(SubjectError) as refused:
        subjects.load(f"{__name__}:{name}")

    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", list(subjects.ADAPTERS))
def test_every_adapter_can_be_found_without_its_package(name: str) -> None:
    """Its class is imported, what it needs is not."""
    kind = subjects.find(name)

    assert issubclass(kind, Adapter)
    assert kind.name == name
    assert kind.capabilities.policies is not None


LIMITED = Capabilities(
    dtypes=("float16",),
    head_dims=(32, 64),
    groups=(1, 2, 4, 8),
    masks=(True,),
    scales="positive",
    ragged=False,
    padding=False,
    multi_token=False,
    max_rows=2,
    cache="functional",
    overflow=False,
    growth=False,
    peeks=False,
    forks=False,
    rollbacks=False,
    lse=False,
    tiles=False,
    layouts=("contiguous", "transposed"),
    empty=False,
    blind=False,
    policies={},
)
SQUARE = replace(LIMITED, ops=("attention",), masks=(False, True), alignment="square", dtypes=("float32", "bfloat16"))


@pytest.fixture
def offered(request: pytest.FixtureRequest) -> Iterator[Capabilities]:
    before = capabilities.current()
    capabilities.use(request.param)
    yield request.param
    capabilities.use(before)


@pytest.mark.parametrize(
    "offered", [LIMITED, SQUARE, replace(LIMITED, ragged=True), TorchSDPA.capabilities], indirect=True
)
@pytest.mark.parametrize("options", [{}, {"several_splits": True}, {"min_steps": 2}])
def test_no_case_is_drawn_that_a_kernel_does_not_offer(offered: Capabilities, options: dict[str, Any]) -> None:
    if options and offered.ops == ("attention",):
        options = {"ops": ("attention",)}

    @settings(max_examples=100, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(size="small", **options))
    def draws(case: Case) -> None:
        offered.require(case)

    draws()


@pytest.mark.parametrize("offered", [SQUARE], indirect=True)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ops": ("attention_with_kv_cache",)}, "op attention_with_kv_cache"),
        ({"dtypes": ("float16",)}, "dtype float16"),
        ({"min_group": 9}, "query heads a kv head"),
    ],
)
def test_a_law_that_can_draw_nothing_is_not_offered(offered: Capabilities, options: dict[str, Any], words: str) -> None:
    del offered
    with pytest.raises(NotOffered, match=words):
        find(cases(size="small", **options), lambda _: True)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case(dtype="float32"), "float32"),
        (Case(head_dim=16), "head_dim 16"),
        (Case(group_size=3), "3 query heads a kv head"),
        (Case(is_causal=False), "is_causal=False"),
        (Case(scale=-1.0), "scale -1.0"),
        (Case(rows=(Row(),) * 3), "batch 3"),
        (Case(rows=()), "batch 0"),
        (Case(query_layout="gapped"), "gapped query"),
        (Case(block_n=16, kv_split_size=16), "splits of a given size"),
        (Case(rows=(Row(2), Row(1)), start="tuple", capacity=2), "rows of different lengths"),
        (Case(rows=(Row(new=(2,)),), steps=(Step(padding=1),)), "padding among new tokens"),
        (Case(rows=(Row(2, (2,)),), start="tuple", capacity=8), "many tokens a step"),
        (Case(rows=(Row(new=(0,)),)), "a call without tokens"),
        (Case(cache_max_len=1, rows=(Row(new=(2,)),)), "a limit on the cache"),
        (Case(rows=(Row(2),), start="tuple", capacity=2), "buffers that are too short"),
        (Case(steps=(Step(update_cache=False),)), "update_cache=False"),
        (Case(rows=(Row(new=(1, 1)),), steps=(Step(), Step(parent=0))), "continuing from an older cache"),
        (Case(rows=(Row(new=(1, 1)),), steps=(Step(), Step(rollback=1))), "roll-back"),
        (Case(rows=(Row(1, (2,)),), op="attention"), "queries without keys"),
    ],
)
def test_what_a_case_asks_for_in_vain_is_named(case: Case, words: str) -> None:
    """Whatever else the case asks for is offered."""
    fields: dict[str, Any] = {"dtype": "float16", "head_dim": 32, "is_causal": True}
    named = {"float32": "dtype", "head_dim 16": "head_dim", "is_causal=False": "is_causal"}.get(words)
    asked = replace(case, **{name: value for name, value in fields.items() if name != named})

    with pytest.raises(NotOffered, match=re.escape(words)):
        LIMITED.require(asked)


def test_a_documented_policy_has_a_place_and_only_our_own_is_owed() -> None:
    with pytest.raises(ValueError, match="source must be a link"):
        Policy("0", "documented")
    with pytest.raises(ValueError, match="source must be a link"):
        Policy("0", "observed", "https://example.org")

    zero = Policy("0 and -inf", "documented", "https://example.org", is_ours=True)
    seen = replace(LIMITED, policies={"empty rows": zero, "visible NaN": Policy("reaches all", "observed")})
    assert [topic for topic in capabilities.TOPICS if seen.keeps(topic)] == ["empty rows"]
    assert all(capabilities.EVERYTHING.keeps(topic) for topic in capabilities.TOPICS)


def test_laws_are_owed_by_what_they_ask_for() -> None:
    found = laws.discover()
    sdpa, _ = laws.owed(found, TorchSDPA.capabilities.meets)
    full, lacking = laws.owed(found, capabilities.EVERYTHING.meets)

    assert (set(full), lacking) == (set(found), {})
    assert "output_and_lse_lie_within_the_error_budget_at_every_step" in sdpa
    assert "lse_is_monotone_in_the_visible_set" not in sdpa
    assert "nothing_invisible_is_read" not in sdpa
    math = as_subject(Math(), "math")
    assert math.model("cpu").scale_into_query
    assert not math.meets("declared arithmetic", "cpu"), "an outer bound says nothing of its bits"


@pytest.mark.parametrize("kind", [TorchSDPA, Math, Flash])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pytorchs_attention_lies_within_the_error_budget(kind: type[Adapter], dtype: Any) -> None:
    """Ragged rows, a chunk and a decode step on a cache that the caller keeps; and without one."""
    rows = (Row(5, (3, 1)), Row(0, (2, 1), 1), Row(17, (0, 1), 2))
    case = Case(rows, (Step(), Step()), 2, 3, head_dim=32, dtype=dtype, is_causal=True, start="tuple", capacity=40)
    plain = Case((Row(9, (9,)), Row(9, (9,), 1)), op="attention", is_causal=True, head_dim=32, dtype=dtype)

    for each in (case, plain):
        used = check(replace(each, values="normal"), as_subject(kind(), kind.name))
        assert 0 < used.out < 1
        assert used.lse == 0


def test_an_adapter_that_attends_wrongly_is_seen() -> None:
    class TopLeft(TorchSDPA):
        def run(self, call: Call) -> torch.Tensor:
            return scaled_dot_product_attention(call.query, call.keys, call.values, is_causal=True)

    case = Case((Row(9, (4,)),), is_causal=True, values="normal", start="tuple", capacity=16)

    with pytest.raises(LawViolation, match="out exceeds its error budget"):
        check(case, as_subject(TopLeft(), "top-left"))


@pytest.mark.parametrize("name", subjects.ADAPTERS)
def test_an_adapter_is_what_its_name_says_without_its_package(name: str) -> None:
    module, _, attribute = subjects.ADAPTERS[name].partition(":")
    adapter = getattr(importlib.import_module(module), attribute)

    assert adapter.name == name
    assert issubclass(adapter, Adapter)
    assert adapter.capabilities.policies

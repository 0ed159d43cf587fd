"""Cases round-trip, and nothing that is not a case gets in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis.vendor.pretty import pretty

from properties import case as case_module
from properties.case import Case, CaseError, Patch, Row, Step
from properties.case_file import CaseFile
from properties.strict_json import MAX_BYTES, MAX_DEPTH, parse

SCHEMA = json.loads((Path(__file__).parents[1] / "fixtures/schema/case.schema.json").read_text())

EVERY_FIELD_SET = Case(
    rows=(Row(cached=17, new=(3, 1), uid=4), Row(cached=0, new=(0, 2), uid=9)),
    steps=(Step(padding=1, update_cache=False), Step(parent=0, rollback=2)),
    num_kv_heads=2,
    group_size=3,
    kv_head_copies=2,
    head_dim=80,
    dtype="bfloat16",
    is_causal=True,
    scale=-0.1,
    start="kv_cache",
    capacity=33,
    cache_max_len=64,
    query_layout="gapped",
    key_layout="expanded_heads",
    cache_layout="transposed",
    block_m=16,
    block_n=32,
    kv_split_size=64,
    values="lattice",
    gain=-3,
    seed=7,
    patches=(Patch("key", 1, 2, 1, 79, "nan"), Patch("query", 0, 17, 5, 0, (-0.1).hex())),
)
FILE = CaseFile("test_x::test_law", "flashcore", EVERY_FIELD_SET, "0" * 64, "a story", {"torch": "2.13", "n": 1})


def test_the_example_sets_every_field() -> None:
    defaults = Case()
    same = [f.name for f in dataclasses.fields(Case) if getattr(defaults, f.name) == getattr(EVERY_FIELD_SET, f.name)]
    assert same == ["op"]


def test_repr_is_a_constructor_call() -> None:
    assert eval(repr(EVERY_FIELD_SET)) == EVERY_FIELD_SET
    assert repr(Case()) == "Case()"
    assert pretty(Case(head_dim=80)) == "Case(head_dim=80)"
    assert repr(Case(rows=(Row(new=(17,)),))) == "Case(rows=(Row(new=(17,)),))"


def test_json_gives_the_case_back() -> None:
    assert Case.from_json(EVERY_FIELD_SET.to_json()) == EVERY_FIELD_SET
    assert Case.from_json(Case().to_json()) == Case()


def test_file_gives_the_record_back_and_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    path.write_text(FILE.dumps())

    assert CaseFile.read(path) == FILE
    assert CaseFile.read(path).dumps() == FILE.dumps()


Break = Callable[[dict[str, Any]], object]


def edited(change: Break) -> str:
    record = json.loads(FILE.dumps())
    change(record)
    return json.dumps(record)


def setting(path: str, value: object) -> Break:
    def change(record: dict[str, Any]) -> None:
        *parents, last = [int(name) if name.isdigit() else name for name in path.split(".")]
        node: Any = record
        for name in parents:
            node = node[name]
        node[last] = value

    return change


HOSTILE = {
    "truncated": FILE.dumps()[:-20],
    "empty": "",
    "not an object": "[]",
    "duplicate key": FILE.dumps().replace('"law":', '"law": "a", "law":', 1),
    "NaN": FILE.dumps().replace('"gain": -3', '"gain": NaN'),
    "Infinity": FILE.dumps().replace('"scale": -0.1', '"scale": Infinity'),
    "overflowing number": FILE.dumps().replace('"scale": -0.1', '"scale": 1e999'),
    "float for an integer": FILE.dumps().replace('"cached": 17', '"cached": 1e9'),
    "absurd size": edited(setting("case.rows.0.cached", 10**9)),
    "absurd digits": FILE.dumps().replace('"cached": 17', '"cached": ' + "9" * 5000),
    "bool for an integer": edited(setting("case.gain", True)),
    "integer for a bool": edited(setting("case.is_causal", 1)),
    "text for an integer": edited(setting("case.seed", "7")),
    "null for an integer": edited(setting("case.seed", None)),
    "unknown field": edited(setting("case.extra", 1)),
    "unknown field of the file": edited(setting("extra", 1)),
    "missing field": edited(lambda record: record["case"].pop("gain")),
    "missing field of the file": edited(lambda record: record.pop("law")),
    "unknown family": edited(setting("case.values", "__import__")),
    "rows no list": edited(setting("case.rows", {"0": 1})),
    "row no object": edited(setting("case.rows", [1])),
    "lengths no list": edited(setting("case.rows.0.new", "31")),
    "too few lengths": edited(setting("case.rows.0.new", [1])),
    "too many rows": edited(setting("case.rows", [{"cached": 0, "new": [1, 1], "uid": 0}] * 1025)),
    "too much memory": edited(setting("case.capacity", 1 << 20)),
    "patch out of range": edited(setting("case.patches.0.dim", 200)),
    "patch no number": edited(setting("case.patches.0.value", "0x1; import os")),
    "patch not canonical": edited(setting("case.patches.0.value", "0x1p0")),
    "other format": edited(setting("format", 2)),
    "other generator": edited(setting("generator", 2)),
    "digest no hex": edited(setting("digest", "z" * 64)),
    "story too long": edited(setting("story", "a" * 5000)),
    "story no text": edited(setting("story", 1)),
    "provenance nested": edited(setting("provenance", {"a": [1]})),
    "deep nesting": "[" * 100_000,
    "deep nesting in a field": edited(setting("provenance", [[[[[[[[[[[[[[]]]]]]]]]]]]]])),
    "huge": " " * (MAX_BYTES + 1),
    "pickle": "cposix\nsystem\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_file_is_refused_with_one_line(text: str) -> None:
    with pytest.raises(CaseError) as refusal:
        CaseFile.loads(text)

    assert 10 < len(str(refusal.value)) < 300
    assert "\n" not in str(refusal.value)


def test_bytes_that_are_not_utf8_are_refused() -> None:
    with pytest.raises(CaseError, match="UTF-8"):
        CaseFile.loads(FILE.dumps().encode().replace(b"a story", b"\xff\xfe"))


def test_missing_file_is_named_in_the_refusal(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match=r"absent\.json: cannot be read"):
        CaseFile.read(tmp_path / "absent.json")


def test_nesting_limit_is_exact_and_ignores_strings() -> None:
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert parse(json.dumps("[{" * 100 + '\\"[' * 100)) is not None
    with pytest.raises(CaseError, match="nested"):
        parse("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": ()}, "steps must be a tuple of 1 to 64 items"),
        ({"head_dim": 257}, r"head_dim must be an integer in \[1, 256\], got 257"),
        ({"rows": (Row(cached=1),)}, "with start 'empty', got 0 and 1"),
        ({"rows": (Row(cached=2),), "start": "tuple", "capacity": 1}, "capacity must be at least 2, got 1"),
        ({"start": "tuple"}, "capacity must be at least 1, got 0"),
        ({"kv_split_size": 16}, "kv_split_size must be a multiple of block_n=None"),
        ({"kv_split_size": 24, "block_n": 16}, "kv_split_size must be a multiple of block_n=16, got 24"),
        ({"block_m": 24}, "block_m must be one of 16, 32"),
        ({"query_layout": "expanded_heads"}, "query_layout must not be"),
        ({"cache_layout": "gapped"}, "cache_layout must be 'contiguous' without a given cache"),
        ({"op": "attention", "rows": (Row(), Row(cached=1))}, "rows must agree"),
        ({"op": "attention", "steps": (Step(padding=1),)}, "one plain step"),
        ({"num_kv_heads": 3, "kv_head_copies": 2}, "kv_head_copies must divide num_kv_heads=3, got 2"),
        ({"num_kv_heads": 2, "key_layout": "expanded_heads"}, "kv_head_copies must be num_kv_heads=2 with"),
        ({"scale": float("nan")}, "scale must be a finite float or None"),
        ({"steps": (Step(parent=1),)}, r"steps\[0\].parent must be at most 0, got 1"),
    ],
)
def test_impossible_case_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CaseError, match=message):
        Case(**fields)


def test_only_ancestors_of_the_newest_cache_may_be_parents() -> None:
    """Cache 2 is overwritten by the step that goes back to cache 1; cache 1 is not."""
    rows = (Row(new=(1, 1, 1, 1)),)
    append, back = Step(), Step(parent=1)

    assert Case(rows=rows, steps=(append, append, back, back)).lineage(3) == (0, 1, 3, -1)
    with pytest.raises(CaseError, match=r"steps\[3\].parent must be -1 or an ancestor"):
        Case(rows=rows, steps=(append, append, back, Step(parent=2)))


def test_caches_older_than_a_roll_back_may_not_be_parents() -> None:
    """The tokens after a roll-back lie where older caches, which may be longer, hold theirs."""
    rows = (Row(new=(1, 1, 1, 1)),)
    append, dropping = Step(), Step(rollback=1)

    assert Case(rows=rows, steps=(append, dropping, append, Step(parent=2))).lineage(3) == (2, 3, -1)
    assert Case(rows=rows, steps=(append, Step(update_cache=False, rollback=1), append, Step(parent=0))).steps
    with pytest.raises(CaseError, match=r"steps\[3\].parent must be -1 or an ancestor"):
        Case(rows=rows, steps=(append, dropping, append, Step(parent=0)))


def schema_leaves(node: dict[str, Any], path: str) -> list[tuple[str, dict[str, Any]]]:
    if "$ref" in node:
        node = SCHEMA["$defs"][node["$ref"].rsplit("/", 1)[1]]
    if "properties" in node:
        return [leaf for name, child in node["properties"].items() for leaf in schema_leaves(child, f"{path}.{name}")]
    if "items" in node:
        return [(path, node), *schema_leaves(node["items"], f"{path}.0")]
    return [(path, node)]


def test_schema_names_exactly_the_fields() -> None:
    for kind, name in ((Case, "case"), (Row, "row"), (Step, "step"), (Patch, "patch")):
        definition = SCHEMA["$defs"][name]
        fields = [f.name for f in dataclasses.fields(kind)]
        assert list(definition["properties"]) == fields
        assert definition["required"] == fields
        assert definition["additionalProperties"] is False
    assert list(SCHEMA["properties"]) == list(json.loads(FILE.dumps()))


CASE_LEAVES = schema_leaves(SCHEMA["properties"]["case"], "case")


@pytest.mark.parametrize(("path", "leaf"), CASE_LEAVES, ids=[path for path, _ in CASE_LEAVES])
def test_schema_and_constructor_draw_the_same_limits(path: str, leaf: dict[str, Any]) -> None:
    """One step outside what the schema allows, the constructor refuses, naming the schema's own limits."""
    if leaf.get("type") == "array":
        item = json.loads(FILE.dumps())["case"]
        for name in path.split(".")[1:]:
            item = item[int(name) if name.isdigit() else name]
        outside, limits = [item[:1] * (leaf["maxItems"] + 1)], [str(leaf["maxItems"])]
    elif "minimum" in leaf:
        outside = [leaf["minimum"] - 1, leaf["maximum"] + 1, True, float(leaf["maximum"])]
        limits = [f"[{leaf['minimum']}, {leaf['maximum']}]"]
    elif "enum" in leaf:
        outside, limits = ["other", -1, [], {}], []
        choices = [choice for choice in leaf["enum"] if choice is not None]
        known = {
            tuple(v)
            for v in vars(case_module).values()
            if isinstance(v, tuple) and all(isinstance(x, str | int) for x in v)
        }
        assert tuple(choices) in known or (*choices, "expanded_heads") in known
    else:
        outside, limits = ["", {}, [], "x" * 1000], []

    for value in outside:
        with pytest.raises(CaseError) as refusal:
            CaseFile.loads(edited(setting(path, value)))
        assert all(limit in str(refusal.value) for limit in limits)

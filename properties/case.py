"""One problem and its schedule, small enough to read: what a failure is stored as, and shrinks to.

A case holds no tensors. Its arrays follow from `seed`, the rows' `uid` and the value family
(`properties.values`), its lengths from the rows and steps (`properties.schedule`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from properties.requirements import (
    CaseError,
    canonical_hex,
    require_bool,
    require_choice,
    require_int,
    require_tuple,
    shown,
)
from properties.strict_json import parse

__all__ = [
    "DTYPES",
    "FAMILIES",
    "GENERATOR_VERSION",
    "LAYOUTS",
    "OPS",
    "STARTS",
    "TENSORS",
    "TILES",
    "Case",
    "CaseError",
    "Patch",
    "Row",
    "Step",
]

# Bumped whenever the same case would give other arrays: a stored case is then no longer the one recorded.
GENERATOR_VERSION = 1

DTYPES = ("float32", "float16", "bfloat16")
OPS = ("attention_with_kv_cache", "attention")
STARTS = ("empty", "tuple", "kv_cache")
LAYOUTS = ("contiguous", "transposed", "padded", "gapped", "expanded_heads")
TENSORS = ("query", "key", "value")
TILES = (16, 32, 64, 128, 256)
# Simple to complex, the order in which a failure tries them; `properties.values` says what each is for.
FAMILIES = (
    "zeros",
    "ones",
    "iota",
    "integers",
    "lattice",
    "one_hot",
    "normal",
    "constant_values",
    "negative_logits",
    "large_logits",
    "score_range",
    "rising",
    "falling",
    "near_ties",
    "dynamic_range",
    "subnormal",
    "coherent",
    "large_values",
)

MAX_ROWS = 1024
MAX_STEPS = 64
MAX_LENGTH = 1 << 20
MAX_HEADS = 1024
MAX_HEAD_DIM = 256
MAX_GAIN = 40
MAX_PATCHES = 64
MAX_ELEMENTS = 1 << 30  # in all arrays of a case together
MAX_UID = (1 << 32) - 1


class _ShortRepr:
    """Write only what differs from the default, so that a minimal case reads as one."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]

    def __repr__(self) -> str:
        said = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(said)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the same in Hypothesis's reports; a case holds no cycle."""
        assert not cycle
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class Row(_ShortRepr):
    """One sequence of the batch.

    Attributes:
        cached: slots valid before step 0 [tokens]; for op "attention" the number of keys.
        new: real new tokens of each step; for op "attention" the number of queries.
        uid: names the row's data: two rows with one uid hold the same numbers.
    """

    cached: int = 0
    new: tuple[int, ...] = (1,)
    uid: int = 0

    def __post_init__(self) -> None:
        """Refuse what no caller could mean."""
        require_int("cached", self.cached, 0, MAX_LENGTH)
        require_tuple("new", self.new, 1, MAX_STEPS)
        for s, count in enumerate(self.new):
            require_int(f"new[{s}]", count, 0, MAX_LENGTH)
        require_int("uid", self.uid, 0, MAX_UID)


@dataclass(frozen=True, repr=False)
class Step(_ShortRepr):
    """One call.

    Attributes:
        padding: columns of right padding beyond the longest row: q_len = max(new) + padding.
        update_cache: False attends and stores nothing.
        parent: the cache this call continues from: -1 the newest, 0 the initial one, k the one there was
            after step k - 1. Only the newest cache and those it was made from since the last roll-back may be
            named: any other shares buffers with the newest one and has been overwritten.
        rollback: tokens each row drops first (never below 0), by passing a shorter seq_lens.
    """

    padding: int = 0
    update_cache: bool = True
    parent: int = -1
    rollback: int = 0

    def __post_init__(self) -> None:
        """Refuse what no caller could mean."""
        require_int("padding", self.padding, 0, MAX_LENGTH)
        require_bool("update_cache", self.update_cache)
        require_int("parent", self.parent, -1, MAX_STEPS)
        require_int("rollback", self.rollback, 0, MAX_LENGTH)


@dataclass(frozen=True, repr=False)
class Patch(_ShortRepr):
    """One element set by hand, after everything else.

    Attributes:
        tensor: "query", "key" or "value".
        row: index into the case's rows.
        token: absolute position of the token in its sequence, whichever step brings it.
        head: a query head for "query", a key/value head otherwise.
        dim: index into head_dim.
        value: `float.hex()` of the value ("nan", "inf", "-inf" too), rounded to the case's dtype.
    """

    tensor: Literal["query", "key", "value"]
    row: int
    token: int
    head: int
    dim: int
    value: str

    def __post_init__(self) -> None:
        """Refuse what no caller could mean."""
        require_choice("tensor", self.tensor, TENSORS)
        require_int("row", self.row, 0, MAX_ROWS - 1)
        require_int("token", self.token, 0, MAX_LENGTH)
        require_int("head", self.head, 0, MAX_HEADS - 1)
        require_int("dim", self.dim, 0, MAX_HEAD_DIM - 1)
        if not isinstance(self.value, str) or len(self.value) > 32 or canonical_hex(self.value) != self.value:
            raise CaseError(f"value must be the float.hex() of a float64, got {shown(self.value)}")

    @property
    def number(self) -> float:
        """The value, before rounding."""
        return float.fromhex(self.value)


@dataclass(frozen=True, repr=False)
class Case(_ShortRepr):
    """One problem and its schedule; the constructor refuses what no caller could mean.

    Attributes:
        rows: the batch.
        steps: the calls, in order; op "attention" has exactly one.
        num_kv_heads, group_size: num_q_heads = num_kv_heads * group_size.
        kv_head_copies: consecutive key/value heads that hold the same numbers (GQA as MHA, expansion).
        head_dim: 1..256.
        dtype: of all inputs and of the cache.
        is_causal: bottom-right alignment.
        scale: of the logits; None for head_dim ** -0.5.
        op: the function under test.
        start: "empty": no cache is given; "tuple": (k_cache, v_cache) with seq_lens; "kv_cache": a KVCache.
        capacity: slots of the buffers given at the start; 0 with start "empty" and op "attention".
        cache_max_len: no cache may grow past this many slots.
        query_layout, key_layout, cache_layout: how query, new key/value, and the given cache lie in memory;
            `properties.layouts` says what the names mean.
        block_m, block_n: tiles; None leaves the choice to the subject.
        kv_split_size: slots a split takes, a multiple of block_n; None leaves the choice to the subject.
        values: the family of the data.
        gain: query is multiplied by 2 ** gain (saturating at the largest finite value).
        seed: of the data.
        patches: single elements set last.
    """

    rows: tuple[Row, ...] = (Row(),)
    steps: tuple[Step, ...] = (Step(),)
    num_kv_heads: int = 1
    group_size: int = 1
    kv_head_copies: int = 1
    head_dim: int = 16
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    is_causal: bool = False
    scale: float | None = None
    op: Literal["attention_with_kv_cache", "attention"] = "attention_with_kv_cache"
    start: Literal["empty", "tuple", "kv_cache"] = "empty"
    capacity: int = 0
    cache_max_len: int = 4096
    query_layout: Literal["contiguous", "transposed", "padded", "gapped", "expanded_heads"] = "contiguous"
    key_layout: Literal["contiguous", "transposed", "padded", "gapped", "expanded_heads"] = "contiguous"
    cache_layout: Literal["contiguous", "transposed", "padded", "gapped", "expanded_heads"] = "contiguous"
    block_m: int | None = None
    block_n: int | None = None
    kv_split_size: int | None = None
    values: str = "zeros"
    gain: int = 0
    seed: int = 0
    patches: tuple[Patch, ...] = field(default=())

    def __post_init__(self) -> None:
        """Refuse what no caller could mean."""
        require_tuple("rows", self.rows, 0, MAX_ROWS, Row)
        require_tuple("steps", self.steps, 1, MAX_STEPS, Step)
        require_tuple("patches", self.patches, 0, MAX_PATCHES, Patch)
        require_int("num_kv_heads", self.num_kv_heads, 1, MAX_HEADS)
        require_int("group_size", self.group_size, 1, MAX_HEADS)
        require_int("num_kv_heads * group_size", self.num_q_heads, 1, MAX_HEADS)
        require_int("kv_head_copies", self.kv_head_copies, 1, MAX_HEADS)
        require_int("head_dim", self.head_dim, 1, MAX_HEAD_DIM)
        require_choice("dtype", self.dtype, DTYPES)
        require_bool("is_causal", self.is_causal)
        if self.scale is not None and (type(self.scale) is not float or not math.isfinite(self.scale)):
            raise CaseError(f"scale must be a finite float or None, got {shown(self.scale)}")
        require_choice("op", self.op, OPS)
        require_choice("start", self.start, STARTS)
        require_int("capacity", self.capacity, 0, MAX_LENGTH)
        require_int("cache_max_len", self.cache_max_len, 1, MAX_LENGTH)
        for name in ("query_layout", "key_layout", "cache_layout"):
            require_choice(name, getattr(self, name), LAYOUTS)
        for name in ("block_m", "block_n"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), TILES[0], TILES[-1])
                require_choice(name, getattr(self, name), TILES)
        if self.kv_split_size is not None:
            require_int("kv_split_size", self.kv_split_size, 1, MAX_LENGTH)
        require_choice("values", self.values, FAMILIES)
        require_int("gain", self.gain, -MAX_GAIN, MAX_GAIN)
        require_int("seed", self.seed, 0, MAX_UID)
        self._require_consistent_fields()
        self._require_consistent_schedule()

    def _require_consistent_fields(self) -> None:
        if self.kv_split_size is not None and (self.block_n is None or self.kv_split_size % self.block_n != 0):
            raise CaseError(f"kv_split_size must be a multiple of block_n={self.block_n}, got {self.kv_split_size}")
        if self.num_kv_heads % self.kv_head_copies != 0:
            raise CaseError(f"kv_head_copies must divide num_kv_heads={self.num_kv_heads}, got {self.kv_head_copies}")
        if self.key_layout == "expanded_heads" and self.kv_head_copies != self.num_kv_heads:
            raise CaseError(
                f"kv_head_copies must be num_kv_heads={self.num_kv_heads} with key_layout 'expanded_heads', "
                f"got {self.kv_head_copies}"
            )
        for name in ("query_layout", "cache_layout"):
            if getattr(self, name) == "expanded_heads":
                raise CaseError(f"{name} must not be 'expanded_heads': only key and value may share heads")
        if self.start == "empty" and self.op == "attention_with_kv_cache" and self.cache_layout != "contiguous":
            raise CaseError(f"cache_layout must be 'contiguous' without a given cache, got {self.cache_layout!r}")
        for p, patch in enumerate(self.patches):
            heads = self.num_q_heads if patch.tensor == "query" else self.num_kv_heads
            for name, limit in (("row", len(self.rows)), ("head", heads), ("dim", self.head_dim)):
                if getattr(patch, name) >= limit:
                    raise CaseError(f"patches[{p}].{name} must be below {limit}, got {getattr(patch, name)}")

    def _require_consistent_schedule(self) -> None:
        for b, row in enumerate(self.rows):
            if len(row.new) != len(self.steps):
                raise CaseError(f"rows[{b}].new must have one length a step ({len(self.steps)}), got {len(row.new)}")
        for s, step in enumerate(self.steps):
            if step.parent > s:
                raise CaseError(f"steps[{s}].parent must be at most {s}, got {step.parent}")
            if step.parent not in self.lineage(s):
                raise CaseError(f"steps[{s}].parent must be -1 or an ancestor of the newest cache, got {step.parent}")
        if self.op == "attention":
            self._require_plain_attention()
        else:
            longest = max((row.cached for row in self.rows), default=0)
            if self.start == "empty" and (self.capacity or longest):
                raise CaseError(f"capacity and cached must be 0 with start 'empty', got {self.capacity} and {longest}")
            if self.start != "empty" and self.capacity < max(1, longest):
                raise CaseError(f"capacity must be at least {max(1, longest)}, got {self.capacity}")
        tokens = sum(row.cached + sum(row.new) for row in self.rows)
        tokens += len(self.rows) * sum(step.padding for step in self.steps)
        if self.op == "attention_with_kv_cache":
            tokens += len(self.rows) * (self.cache_max_len if self.start == "empty" else self.capacity)
        elements = tokens * (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim
        if elements > MAX_ELEMENTS:
            raise CaseError(f"the arrays must have at most {MAX_ELEMENTS} elements together, got {elements}")

    def _require_plain_attention(self) -> None:
        if self.steps != (Step(),):
            raise CaseError("steps must be one plain step with op 'attention'")
        if self.start != "empty" or self.capacity or self.cache_layout != "contiguous":
            raise CaseError("start, capacity and cache_layout must be the defaults with op 'attention'")
        shapes = sorted({(row.cached, row.new) for row in self.rows})
        if len(shapes) > 1:
            raise CaseError(f"rows must agree in cached and new with op 'attention', got {shapes[0]} and {shapes[1]}")

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def num_q_heads(self) -> int:
        """Number of query heads."""
        return self.num_kv_heads * self.group_size

    @property
    def softmax_scale(self) -> float:
        """The scale in force, the default resolved."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def lineage(self, s: int) -> tuple[int, ...]:
        """Caches step s may name as its parent, oldest first, and -1.

        Cache k is the one there is after step k - 1 (which made it or passed it on), cache 0 the initial one. What
        follows a roll-back overwrites the older caches unless the buffers have grown: they may not be named.
        """
        line = [0]
        for k, step in enumerate(self.steps[:s]):
            if step.parent >= 0:
                line = line[: line.index(step.parent) + 1]
            if step.rollback and step.update_cache:
                line = []
            line.append(k + 1)
        return (*line, -1)

    def to_json(self) -> str:
        """Return the case as one line of JSON with every field; `from_json` gives it back."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @staticmethod
    def from_json(text: str | bytes) -> Case:
        """Read `to_json` text; anything else is a `CaseError` of one line."""
        return Case.from_fields(parse(text))

    @staticmethod
    def from_fields(fields: object) -> Case:
        """Build a case from parsed JSON; every field must be there and no other."""
        known = _fields_of(Case, fields, "case")
        known["rows"] = _records(Row, known["rows"], "rows", MAX_ROWS)
        known["steps"] = _records(Step, known["steps"], "steps", MAX_STEPS)
        known["patches"] = _records(Patch, known["patches"], "patches", MAX_PATCHES)
        if type(known["scale"]) is int:
            known["scale"] = float(known["scale"])
        return Case(**known)  # type: ignore[arg-type]  # the constructor checks every type


def _records(kind: type, items: object, name: str, most: int) -> tuple[object, ...]:
    if not isinstance(items, list) or len(items) > most:
        raise CaseError(f"{name} must be a list of at most {most} objects, got {shown(items)}")
    records = []
    for i, item in enumerate(items):
        fields = _fields_of(kind, item, f"{name}[{i}]")
        if isinstance(fields.get("new"), list):
            fields["new"] = tuple(fields["new"])  # type: ignore[arg-type]
        try:
            records.append(kind(**fields))
        except CaseError as error:
            raise CaseError(f"{name}[{i}]: {error}") from None
    return tuple(records)


def _fields_of(kind: type, item: object, name: str) -> dict[str, object]:
    if not isinstance(item, dict):
        raise CaseError(f"{name} must be an object, got {shown(item)}")
    wanted = {f.name for f in dataclasses.fields(kind)}
    for problem, keys in (("unknown", item.keys() - wanted), ("missing", wanted - item.keys())):
        if keys:
            raise CaseError(f"{name} must have exactly the known fields, got {problem} {shown(min(keys))}")
    return dict(item)

"""What a kernel can be asked for: strategies draw within it, laws that need more are not owed.

A kernel that follows the contract in everything needs none of this: ``Capabilities()`` offers all there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from properties.case import DTYPES, LAYOUTS, MAX_HEAD_DIM, MAX_HEADS, MAX_ROWS, OPS, Case
from properties.needs import Need
from properties.schedule import Outline, outline

Basis = Literal["documented", "observed", "undefined"]
Topic = Literal[
    "causal alignment",
    "scale",
    "empty rows",
    "NaN in unread memory",
    "visible NaN",
    "bits across runs",
    "bits across batches",
    "bits across layouts",
    "exact results",
]
TOPICS: tuple[Topic, ...] = get_args(Topic)


class NotOffered(Exception):
    """A case, or a law, asks for what the kernel does not offer. Not a verdict; the message says what."""


@dataclass(frozen=True)
class Policy:
    """What a kernel does in a matter in which kernels differ.

    Attributes:
        what: it does, in a few words.
        basis: "documented": it promises that, at ``source``; "observed": releases do it, no document says so;
            "undefined": nothing may be expected.
        source: link to the statement.
        is_ours: it is what the contract of this project promises. Only what is also documented is judged by a law.
    """

    what: str
    basis: Basis
    source: str = ""
    is_ours: bool = False

    def __post_init__(self) -> None:
        """A document has a place."""
        if (self.basis == "documented") != self.source.startswith("https://"):
            raise ValueError(f"source must be a link exactly if the policy is documented, got {self.source!r}")

    @property
    def is_owed(self) -> bool:
        """Whether breaking it is a defect by the contract's laws."""
        return self.is_ours and self.basis == "documented"


@dataclass(frozen=True)
class Capabilities:
    """What a kernel offers.

    Attributes:
        ops: of the two functions, which there are.
        dtypes, head_dims: of all tensors.
        groups: query heads a kv head.
        masks: values of ``is_causal`` it takes.
        alignment: "bottom-right" as in the contract; "square": only where there are as many queries as keys, because
            its own mask is aligned otherwise.
        scales: "any" finite number, "positive" ones, or "default" only.
        ragged: rows of one call may have different lengths.
        padding: rows of one call may have fewer new tokens than ``q_len``.
        multi_token: a call on cached tokens may bring more than one.
        max_rows, max_kv_len: of one call.
        cache: "in place": it appends to the buffers it is given; "functional": it returns new ones; "none": it has no
            cache, and whoever calls it joins cached and new tokens.
        overflow: it refuses a row that would pass ``cache_max_len``.
        growth: buffers may be too short.
        peeks, forks, rollbacks: a call may store nothing, continue from an older cache, drop the newest tokens.
        lse: it returns log-sum-exps.
        tiles: it takes ``block_m``, ``block_n`` and a forced split size.
        layouts: of what it is given.
        empty: a batch or a call may be empty.
        blind: a query may see no key.
        devices: where it runs.
        policies: by topic, what it does where kernels differ; None: all that the contract says. A topic that is
            missing is undefined.
    """

    ops: tuple[str, ...] = OPS
    dtypes: tuple[str, ...] = DTYPES
    head_dims: Sequence[int] = range(1, MAX_HEAD_DIM + 1)
    groups: Sequence[int] = range(1, MAX_HEADS + 1)
    masks: tuple[bool, ...] = (False, True)
    alignment: Literal["bottom-right", "square"] = "bottom-right"
    scales: Literal["any", "positive", "default"] = "any"
    ragged: bool = True
    padding: bool = True
    multi_token: bool = True
    max_rows: int = MAX_ROWS
    max_kv_len: int = 1 << 20
    cache: Literal["in place", "functional", "none"] = "in place"
    overflow: bool = True
    growth: bool = True
    peeks: bool = True
    forks: bool = True
    rollbacks: bool = True
    lse: bool = True
    tiles: bool = True
    layouts: tuple[str, ...] = LAYOUTS
    empty: bool = True
    blind: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    policies: Mapping[Topic, Policy] | None = None

    def keeps(self, topic: Topic) -> bool:
        """Whether it promises what the contract does."""
        return self.policies is None or (topic in self.policies and self.policies[topic].is_owed)

    def meets(self, need: Need) -> bool:
        """Whether a law that asks for this can be judged."""
        match need:
            case "lse" | "tiles" | "overflow":
                return bool(getattr(self, need))
            case "cache":
                return self.cache != "none"
            case "cache in place":
                return self.cache == "in place"
            case "refusals" | "checked arguments" | "device checks" | "declared arithmetic":
                return self.policies is None
            case _:
                return self.keeps(need)

    def scale_is_offered(self, scale: float | None) -> bool:
        """Whether it takes this scale."""
        return scale is None or self.scales == "any" or (self.scales == "positive" and scale > 0)

    def require(self, case: Case) -> None:
        """Say what a case asks for in vain.

        Raises:
            NotOffered: the first such thing.
        """
        if self is EVERYTHING:
            return
        for is_offered, what in (
            (case.op in self.ops, f"op {case.op}"),
            (case.dtype in self.dtypes, case.dtype),
            (case.head_dim in self.head_dims, f"head_dim {case.head_dim}"),
            (case.group_size in self.groups, f"{case.group_size} query heads a kv head"),
            (case.is_causal in self.masks, f"is_causal={case.is_causal}"),
            (self.scale_is_offered(case.scale), f"scale {case.scale}"),
            (case.batch <= self.max_rows, f"batch {case.batch}"),
            (case.query_layout in self.layouts, f"{case.query_layout} query"),
            (case.key_layout in self.layouts, f"{case.key_layout} key and value"),
            (case.cache_layout in self.layouts, f"{case.cache_layout} cache"),
            (self.tiles or case.kv_split_size is None, "splits of a given size"),
            (self.empty or case.rows, "batch 0"),
        ):
            if not is_offered:
                raise NotOffered(what)
        for call in outline(case):
            self._require_call(case, call)

    def _require_call(self, case: Case, call: Outline) -> None:
        plain = case.op == "attention"
        seen = [keys - queries for keys, queries in zip(call.kv_lens, call.new_lens, strict=True) if queries]
        for is_offered, what in (
            (self.ragged or len(set(call.kv_lens)) <= 1, "rows of different lengths"),
            (self.padding or set(call.new_lens) <= {call.q_len}, "padding among new tokens"),
            (self.multi_token or plain or call.q_len <= 1 or not max(call.seq_lens, default=0), "many tokens a step"),
            (max(call.kv_lens, default=0) <= self.max_kv_len, f"more than {self.max_kv_len} keys"),
            (self.empty or (call.q_len and max(call.kv_lens)), "a call without tokens"),
            (self.overflow or call.overflow_row is None, "a limit on the cache"),
            (self.growth or not call.grows, "buffers that are too short"),
            (self.peeks or plain or call.step.update_cache, "update_cache=False"),
            (self.forks or call.parent == call.index, "continuing from an older cache"),
            (self.rollbacks or not call.step.rollback, "roll-back"),
            (self.alignment == "bottom-right" or not (case.is_causal and any(seen)), "causal, keys before the queries"),
            (self.blind or not plain or all(call.kv_lens), "queries without keys"),
            (self.blind or not plain or not case.is_causal or min(seen, default=0) >= 0, "queries without keys"),
        ):
            if not is_offered:
                raise NotOffered(what)


EVERYTHING = Capabilities()

_current = EVERYTHING


def use(capabilities: Capabilities) -> None:
    """Have strategies draw within these, in this process."""
    global _current
    _current = capabilities


def current() -> Capabilities:
    """What strategies draw within."""
    return _current

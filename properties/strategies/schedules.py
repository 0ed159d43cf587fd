"""Rows and steps: the structure of a case, drawn before any dimension.

Lengths are unit * blocks + offset, the unit a tile or a split: what goes wrong goes wrong at multiples of
something, and one off.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

from properties.case import Row, Step
from properties.strategies.choices import Draw, choose
from properties.strategies.sizes import Size

# One token or none first, then where tails end and begin, then the inside of a tile.
_NEW_OFFSETS = (1, 0, -1, 1, 0, -1, 2, *range(2, 15))
_CACHED_OFFSETS = (0, 1, -1) * 4 + tuple(range(2, 15))
_LATER_LENGTHS = (
    *((0, 1), (0, 0), (0, 2), (0, 2), (0, 3), (0, 5), (0, 0), (0, 15)),
    *((1, 0), (1, 1), (1, -1), (2, 0), (2, 1)),
)
_UIDS = tuple(range(16))
_KINDS = ("append", "append", "append", "peek", "fork", "rollback")


@dataclass(frozen=True)
class Units:
    """What lengths are multiples of [tokens], and the length beyond which blocks are taken away."""

    tile: int
    split: int
    most: int

    def length(self, blocks: int, offset: int) -> int:
        """A length in tokens; negative blocks count splits."""
        unit = self.split if blocks < 0 else self.tile
        return max(0, min(abs(blocks), max(1, self.most // unit)) * unit + offset)


@dataclass(frozen=True)
class RowDraft:
    """A row before the tile is known."""

    uid: int
    first: tuple[int, int]
    cached: tuple[int, int]


@dataclass(frozen=True)
class StepDraft:
    """A step before the others are known."""

    kind: str
    amount: int
    padding: int


@dataclass(frozen=True)
class Exchange:
    """Another length than one token for one row (or all, None) in one of the later steps."""

    row: int | None
    step: int
    length: tuple[int, int]


def draw_rows(draw: Draw, limits: Size, least: int = 0) -> list[RowDraft]:
    """At least one row; five choices each, and one more that ends the list, however long it is."""
    drafts: list[RowDraft] = []
    stops = (None,) * (8 if limits.max_rows < 8 else 1)
    blocks = tuple(range(limits.max_blocks + 1))
    while True:
        b = len(drafts)
        uid = choose(draw, f"rows[{b}].uid", (*stops, *_UIDS))
        if (uid is None and b >= max(1, least)) or b == limits.max_rows:
            return drafts
        first = choose(draw, f"rows[{b}].first blocks", (0, *blocks))
        first_offset = choose(draw, f"rows[{b}].first offset", _NEW_OFFSETS)
        if first == 0 and first_offset < 0:
            first_offset = 2
        cached = choose(draw, f"rows[{b}].cached blocks", (*blocks, *(-n for n in blocks[1:])))
        cached_offset = choose(draw, f"rows[{b}].cached offset", _CACHED_OFFSETS)
        drafts.append(RowDraft(uid or 0, (first, first_offset), (cached, cached_offset)))


def draw_steps(draw: Draw, most: int, least: int = 1) -> tuple[Step, ...]:
    """At least one step; three choices each, and one more that ends the list, however long it is."""
    drafts: list[StepDraft] = []
    while True:
        s = len(drafts)
        kind = choose(draw, f"steps[{s}].kind", (None,) * 2 + _KINDS)
        if (kind is None and s >= least) or s == most:
            return _steps_from(drafts)
        amount = choose(draw, f"steps[{s}].amount", (1, 2, 3, 16, 17))
        padding = choose(draw, f"steps[{s}].padding", (0, 0, 0, 1, 2, 15))
        drafts.append(StepDraft(kind or "append", amount, padding))


def _steps_from(drafts: list[StepDraft]) -> tuple[Step, ...]:
    """The steps; a fork with nothing to go back to is an append."""
    steps: list[Step] = []
    line = [0]  # caches the newest one was made from, itself included
    for s, draft in enumerate(drafts):
        parent = -1
        if draft.kind == "fork" and len(line) > 1:
            line = line[: max(1, len(line) - draft.amount)]
            parent = line[-1]
        rollback = draft.amount if draft.kind == "rollback" else 0
        if rollback:
            line = []
        steps.append(Step(draft.padding, draft.kind != "peek", parent, rollback))
        line.append(s + 1)
    return tuple(steps)


def draw_exchanges(draw: Draw, num_rows: int, num_steps: int) -> list[Exchange]:
    """Lengths of later steps that are not one token; three choices each, and one more that ends the list."""
    exchanges: list[Exchange] = []
    for e in count():
        which = choose(draw, f"exchanges[{e}].row", (-2, -2, -1, *range(4)))
        if which == -2 or e == 8:
            break
        step = choose(draw, f"exchanges[{e}].step", tuple(range(5)))
        length = choose(draw, f"exchanges[{e}].length", _LATER_LENGTHS)
        row = None if which < 0 or not num_rows else which % num_rows
        if num_steps > 1:
            exchanges.append(Exchange(row, 1 + step % (num_steps - 1), length))
    return exchanges


def rows_from(
    drafts: list[RowDraft], exchanges: list[Exchange], num_steps: int, cached: Units, new: Units
) -> tuple[Row, ...]:
    """The rows, once the tile is known."""
    rows = []
    for b, draft in enumerate(drafts):
        lengths = [new.length(*draft.first)] + [1] * (num_steps - 1)
        for exchange in exchanges:
            if exchange.row in (None, b):
                lengths[exchange.step] = new.length(*exchange.length)
        rows.append(Row(cached.length(*draft.cached), tuple(lengths), draft.uid))
    return tuple(rows)

"""Rows and steps: the structure of a case, drawn before any dimension.

Every record is a contiguous run of choices, so that Hypothesis can drop a row or a step whole; lengths are
tiles * blocks + offset, because what goes wrong goes wrong at multiples of something, and one off.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from properties.case import Row, Step
from properties.strategies.sizes import Size

# Where tails begin and end; the other offsets are the inside of a tile.
_EDGES = (0, 1, -1)
_INSIDE = st.integers(2, 14)


def rarely(one_in: int) -> st.SearchStrategy[bool]:
    """True in one of `one_in` draws; shrinks to False."""
    return st.integers(0, one_in - 1).map(lambda n: n == one_in - 1)


@dataclass(frozen=True)
class Length:
    """A length before the tile is known; `first` is the shortest one, without blocks."""

    blocks: int
    offset: int
    by_split: bool = False

    def tokens(self, tile: int, split: int, most: int) -> int:
        """The length in tokens, never negative; blocks beyond the first give way when `most` is passed."""
        unit = split if self.by_split else tile
        return max(0, min(self.blocks, max(1, most // unit)) * unit + self.offset)


def cached_lengths(max_blocks: int) -> st.SearchStrategy[Length]:
    """Shrinks to 0, then to few blocks, then to the edge itself, one after, one before."""
    offsets = st.sampled_from(_EDGES) | _INSIDE
    return st.builds(Length, st.integers(0, max_blocks), offsets, rarely(3))


def new_lengths(max_blocks: int) -> st.SearchStrategy[Length]:
    """Shrinks to one token, then to none, then to few tokens."""
    few = st.sampled_from((1, 0, 2, 3, 5)).map(lambda n: Length(0, n))
    prompt = st.builds(Length, st.integers(1, max_blocks), st.sampled_from((1, 0, -1)) | _INSIDE)
    return few | prompt


@dataclass(frozen=True)
class RowDraft:
    """A row before the tile is known; steps beyond `later` decode one token."""

    first: Length
    cached: Length
    later: list[Length]
    uid: int

    def row(self, num_steps: int, tile: int, split: int, limits: Size) -> Row:
        """The row of a case with that many steps."""
        lengths = [self.first, *self.later, *[Length(0, 1)] * num_steps]
        new = tuple(length.tokens(tile, split, limits.max_new) for length in lengths[:num_steps])
        return Row(self.cached.tokens(tile, split, limits.max_cached), new, self.uid)


def row_drafts(max_blocks: int, max_steps: int) -> st.SearchStrategy[RowDraft]:
    """Shrinks to one new token and an empty cache."""
    later = st.lists(new_lengths(max(1, max_blocks // 2)), max_size=max_steps - 1)
    return st.builds(
        RowDraft, new_lengths(max_blocks), cached_lengths(max_blocks), later, st.integers(0, 255)
    )


@dataclass(frozen=True)
class StepDraft:
    """A step before the others are known."""

    kind: str
    amount: int
    padding: int


@st.composite
def step_drafts(draw: st.DrawFn) -> StepDraft:
    """Shrinks to an append without padding."""
    kind = draw(st.sampled_from(("append", "append", "append", "peek", "fork", "rollback")))
    amount = 0
    if kind == "fork":
        amount = draw(st.integers(1, 3))
    elif kind == "rollback":
        amount = draw(st.sampled_from((1, 2, 3, 16, 17)))
    return StepDraft(kind, amount, draw(st.sampled_from((0, 0, 0, 1, 2, 15))))


def steps_from(drafts: list[StepDraft]) -> tuple[Step, ...]:
    """The steps; a fork with nothing to go back to is an append."""
    steps: list[Step] = []
    line = [0]  # caches the newest one was made from, itself included
    for s, draft in enumerate(drafts):
        parent = -1
        if draft.kind == "fork" and len(line) > 1:
            line = line[: max(1, len(line) - draft.amount)]
            parent = line[-1]
        rollback = draft.amount if draft.kind == "rollback" else 0
        steps.append(Step(draft.padding, draft.kind != "peek", parent, rollback))
        line.append(s + 1)
    return tuple(steps)

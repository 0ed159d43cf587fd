"""The one kind of choice cases are made of: an index into a short list, simplest first.

Why not `st.lists` and `st.builds`: while it shrinks, Hypothesis deletes at most five neighbouring choices at
once, so a record of a list has at most five; and a choice that is not needed is drawn all the same, so that
no choice ever shifts the ones after it. Each field's list is tagged with its name: Hypothesis splices
strategies that look alike into each other, and five of six examples would be such splices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")
Draw = Callable[[st.SearchStrategy[Any]], Any]


@cache
def _tagged(name: str, options: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    return st.sampled_from(tuple((name, option) for option in options)).map(lambda pair: pair[1])


def choose(draw: Draw, name: str, options: tuple[T, ...]) -> T:
    """Draw one of the options; shrinks towards the first. Repeat an option to draw it more often."""
    chosen: T = draw(_tagged(name, options))
    return chosen


def rarely(draw: Draw, name: str, one_in: int) -> bool:
    """Draw True once in `one_in` times; shrinks to False."""
    return choose(draw, name, (False,) * (one_in - 1) + (True,))

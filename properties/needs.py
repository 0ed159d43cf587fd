"""What a law asks of a kernel beyond the numbers and bytes of a call: laws declare it, subjects meet it or do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

Need = Literal[
    "declared arithmetic",
    "lse",
    "tiles",
    "cache",
    "cache in place",
    "overflow",
    "refusals",
    "checked arguments",
    "device checks",
    "empty rows",
    "NaN in unread memory",
    "visible NaN",
    "exact results",
    "bits across runs",
    "bits across batches",
    "bits across layouts",
]
"""
declared arithmetic: the order of its sums and the exactness of its powers are known (``Subject.model``). Only then
    are its bits known on the lattice, where weights 2^-k are exact for exponentials in base 2 and sums divided last,
    and one weight of zero more changes no sum.
lse: it returns log-sum-exps.
tiles: it takes ``block_m``, ``block_n`` and a forced split size.
cache: it keeps the tokens of earlier calls; in place: in the buffers it is given.
overflow: it refuses a row that would pass ``cache_max_len``.
refusals: it raises where an argument is missing that cannot be guessed.
checked arguments: it raises for every malformed argument before it writes anything.
device checks: lengths that the host may not look at, while a CUDA graph is recorded, are checked by the kernel: a row
    that is out of range or does not fit is left as it is, and its cache reports it (``Subject.unseen``).
empty rows: a query that sees no key gives 0 and -inf.
NaN in unread memory: it may lie there.
visible NaN: it reaches exactly the outputs that see it.
exact results: where a weight is exactly 1, or all are equal, no bit of the result is off; a power of two or a sign on
    the values, or moved between query, key and scale, changes nothing else.
bits across runs, batches, layouts: they do not depend on other calls; on other rows, heads and spare slots; on strides.
"""
NEEDS: tuple[Need, ...] = get_args(Need)

_Test = TypeVar("_Test", bound=Callable[..., Any])


def asks(*needs: Need) -> Callable[[_Test], _Test]:
    """Mark a law as owed only by kernels that meet all of these needs.

    Raises:
        ValueError: there is no such need.
    """
    for need in needs:
        if need not in NEEDS:
            raise ValueError(f"a law must ask for one of {', '.join(NEEDS)}, got {need}")

    def mark(test: _Test) -> _Test:
        test.asks = frozenset(needs)  # type: ignore[attr-defined]
        return test

    return mark


def asked_by(test: object) -> frozenset[Need]:
    """What a law asks for; nothing unless it is marked."""
    return getattr(test, "asks", frozenset())

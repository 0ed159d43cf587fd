"""What is put under test: flashcore, and any other function that follows the contract.

A subject is named by its specification: "flashcore", or "package.module:function" for somebody else's kernel.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from properties.case import Case
from properties.needs import Need
from references.arithmetic_model import PERMISSIVE, ArithmeticModel
from references.tiling import Tiles, tiling

DEFAULT = "flashcore"
VARIABLE = "PROPERTIES_SUBJECT"


class SubjectError(ValueError):
    """The specification does not name a function that can be called."""


# Tiles and splits of 16 keys, the smallest that tensor cores take, round most often: the largest budget.
_UNKNOWN_BLOCK_N = 16


def _unforced(case: Case) -> AbstractContextManager[None]:
    del case
    return contextlib.nullcontext()


def _unknown_tiles(case: Case, q_len: int, cached: int, new: int) -> Tiles:
    del q_len
    block_n = case.block_n or _UNKNOWN_BLOCK_N
    return tiling(cached, new, block_n, case.kv_split_size or block_n)


def _permissive(device: str) -> ArithmeticModel:
    del device
    return PERMISSIVE


@dataclass(frozen=True)
class Subject:
    """A kernel and what the suite must know about it.

    Attributes:
        spec: how the user names it.
        attention_with_kv_cache: signature of the contract.
        attention: the same; None if it has none.
        make_cache: (k_cache, v_cache, seq_lens) -> its cache object; None if it takes plain tuples only.
        overflow_error: what it raises when a row does not fit.
        allocators: modules whose ``empty(shape, dtype, device)`` makes everything the kernel writes.
        forced: context in which a case's split size is used.
        tiles: (case, q_len, cached, new) -> the tiles in which it visits the keys of one row, for the error budget.
        model: its arithmetic on "cpu" or "cuda".
        slow: whether it gets small cases on a GPU too.
        paths: contexts that force one of its kernels each, by name; on a correct one they agree.
        is_disturbed: it is called in another way than a case says (see ``properties.callers``).
    """

    spec: str
    attention_with_kv_cache: Callable[..., Any]
    attention: Callable[..., Any] | None = None
    make_cache: Callable[..., Any] | None = None
    overflow_error: type[Exception] = RuntimeError
    allocators: tuple[ModuleType, ...] = ()
    forced: Callable[[Case], AbstractContextManager[Any]] = _unforced
    tiles: Callable[[Case, int, int, int], Tiles] = _unknown_tiles
    model: Callable[[str], ArithmeticModel] = _permissive
    slow: bool = False
    paths: Mapping[str, Callable[[Case], AbstractContextManager[Any]]] = field(default_factory=dict)
    is_disturbed: bool = False

    def meets(self, need: Need, device: str) -> bool:
        """Whether a law that asks for this is owed: all of the contract is, bits of unknown arithmetic are not."""
        return need != "declared arithmetic" or self.model(device) != PERMISSIVE


def load(spec: str) -> Subject:
    """The subject a specification names.

    Raises:
        SubjectError: it names nothing that can be called. One line.
    """
    if spec == DEFAULT:
        try:
            from properties.subjects.flashcore import subject
        except ImportError as error:
            raise SubjectError(f"--subject flashcore cannot be imported: {_one_line(error)}") from error
        return subject()
    module_name, colon, function = spec.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module_name.split("."), function]):
        raise SubjectError(f"--subject must be flashcore or package.module:function, got {spec!r}")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever somebody else's module raises, the user gets one line
        raise SubjectError(
            f"--subject {spec} cannot be imported: {type(error).__name__}: {_one_line(error)}"
        ) from error
    call = getattr(module, function, None)
    if not callable(call):
        raise SubjectError(f"--subject must name a function, got {spec!r}, and {module_name} has no {function}")
    attention = getattr(module, "attention", None)
    return Subject(
        spec=spec,
        attention_with_kv_cache=call,
        attention=attention if callable(attention) else None,
        make_cache=getattr(module, "KVCache", None),
        overflow_error=getattr(module, "CacheOverflowError", RuntimeError),
        allocators=(module,) if callable(getattr(module, "empty", None)) else (),
        slow=getattr(module, "SLOW", False) is True,
    )


def forced_to(subject: Subject, forced: Callable[[Case], AbstractContextManager[Any]]) -> Subject:
    """The subject with one of its ``paths`` forced."""
    return replace(subject, forced=forced, is_disturbed=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


_loaded: dict[str, Subject] = {}


def activate(spec: str) -> Subject:
    """Make a subject the one that laws are run on, in this process and those it starts."""
    subject = _loaded.setdefault(spec, load(spec)) if spec not in _loaded else _loaded[spec]
    os.environ[VARIABLE] = spec
    return subject


def active() -> Subject:
    """The subject that laws are run on."""
    return activate(os.environ.get(VARIABLE, DEFAULT))

"""Calls that a kernel might mistake for one another, and calls that lack what they need."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from properties.assertions import LawViolation, describe
from properties.case import Case
from properties.subjects import Subject

Plan = Callable[[Case], AbstractContextManager[Any]]
KINDS = ("scale", "mask", "tile", "lse", "query", "key", "value")


def among_others(subject: Subject, case: Case) -> Subject:
    """Every call comes between two on the same cache that differ from it in one thing: another thing for every call.

    What those store in the new slots are the same bits.

    Raises:
        NotOffered: the subject does not take such calls.
    """
    subject.capabilities.require(replace(case, scale=0.75, is_causal=not case.is_causal))
    function = subject.attention_with_kv_cache
    calls = itertools.count(case.seed)

    def call(*tensors: Any, **options: Any) -> Any:
        kind, like, other = KINDS[next(calls) % len(KINDS)], list(tensors), dict(options)
        match kind:
            case "scale":
                other["scale"] = 0.75
            case "mask":
                other["is_causal"] = not options["is_causal"]
            case "tile":
                other["block_n"] = 16 if options.get("block_n") != 16 else 32
            case "lse":
                other["return_lse"] = not options["return_lse"]
            case _:
                position = ("query", "key", "value").index(kind)
                like[position] = _gapped(tensors[position])
        function(*like, **other)
        result = function(*tensors, **options)
        function(*like, **other)
        return result

    return replace(subject, attention_with_kv_cache=call, is_disturbed=True)


def among_plans(subject: Subject, case: Case) -> tuple[Subject, Subject]:
    """Every call made with each of the subject's kernels and the one it chooses, and a call made with the last alone.

    Any of them comes last, by the seed; its result counts.
    """
    function = subject.attention_with_kv_cache
    plans = [None, *subject.paths.values()]
    first = case.seed % len(plans)
    *before, last = plans[first:] + plans[:first]

    def planned(plan: Plan | None, *tensors: Any, **options: Any) -> Any:
        with nullcontext() if plan is None else plan(case):
            return function(*tensors, **options)

    def call(*tensors: Any, **options: Any) -> Any:
        for plan in before:
            planned(plan, *tensors, **options)
        return planned(last, *tensors, **options)

    among = replace(subject, attention_with_kv_cache=call, is_disturbed=True)
    return among, replace(subject, attention_with_kv_cache=partial(planned, last), is_disturbed=True)


def _gapped(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers with the tokens twice as far apart."""
    return torch.cat([tensor, tensor], dim=3)[..., : tensor.shape[3]]


def without_lengths(subject: Subject, case: Case) -> Subject:
    """A pair of buffers comes without seq_lens first, which must be refused, and then with them."""
    function = subject.attention_with_kv_cache

    def call(*tensors: Any, **options: Any) -> Any:
        past = options.get("past_key_value")
        if past is not None and not hasattr(past, "seq_lens"):
            incomplete = {name: value for name, value in options.items() if name != "seq_lens"}
            try:
                function(*tensors, **incomplete)
            except ValueError:
                pass
            else:
                report = f"a pair of buffers without seq_lens was accepted\n  case: {describe(case)}"
                raise LawViolation("accepted", report, case)
        return function(*tensors, **options)

    return replace(subject, attention_with_kv_cache=call)

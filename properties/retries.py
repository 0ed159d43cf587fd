"""Calls that a kernel might mistake for one another, and calls that lack what they need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from properties.assertions import LawViolation, describe
from properties.case import Case
from properties.subjects import Subject


def among_others(subject: Subject, *, layout: bool) -> Subject:
    """Every call comes between two on the same cache that differ from it in one thing.

    What those store in the new slots are the same bits.

    Args:
        subject: the kernel.
        layout: they differ in how the query lies in memory; else in scale and mask.
    """
    function = subject.attention_with_kv_cache

    def call(query: torch.Tensor, *tensors: Any, **options: Any) -> Any:
        like = query.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3) if layout else query
        other = options if layout else {**options, "scale": 0.75, "is_causal": not options["is_causal"]}
        function(like, *tensors, **other)
        result = function(query, *tensors, **options)
        function(like, *tensors, **other)
        return result

    return replace(subject, attention_with_kv_cache=call, is_disturbed=True)


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

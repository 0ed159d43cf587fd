"""Other ways to ask for the same call: what they return is the same, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from properties.subjects import Subject

Function = Callable[..., Any]


def _wrapped(subject: Subject, wrap: Callable[[Function, str], Function]) -> Subject:
    attention = subject.attention
    return replace(
        subject,
        attention_with_kv_cache=wrap(subject.attention_with_kv_cache, "attention_with_kv_cache"),
        attention=None if attention is None else wrap(attention, "attention"),
        is_disturbed=True,
    )


def without_lse(subject: Subject) -> Subject:
    """The output is that of a call which did not ask for log-sum-exps; the rest is that of one which did."""

    def wrap(function: Function, op: str) -> Function:
        def call(*tensors: Any, **options: Any) -> Any:
            plain = function(*tensors, **{**options, "return_lse": False})
            out = plain if op == "attention" else plain[0]
            return (out, *function(*tensors, **options)[1:])

        return call

    return _wrapped(subject, wrap)


def spelled_out(subject: Subject) -> Subject:
    """Every argument that a call leaves to its default is given: lengths, scale, heads."""

    def wrap(function: Function, op: str) -> Function:
        def call(*tensors: Any, **options: Any) -> Any:
            query, key, _ = tensors
            options.setdefault("scale", query.shape[3] ** -0.5)
            if op == "attention":
                return function(*tensors, **options)
            options |= {"num_query_heads": query.shape[1], "num_kv_heads": key.shape[1]}
            past = options.get("past_key_value")
            empty = torch.zeros(query.shape[0], dtype=torch.int32, device=query.device)
            lengths = {"new_lens": empty + query.shape[2], "seq_lens": getattr(past, "seq_lens", empty)}
            options = lengths | options
            return function(*tensors, **options)

        return call

    return _wrapped(subject, wrap)


def peeked(subject: Subject) -> Subject:
    """The numbers are those of a call that stores nothing; then comes the call itself."""

    def wrap(function: Function, op: str) -> Function:
        def call(*tensors: Any, **options: Any) -> Any:
            if op == "attention":
                return function(*tensors, **options)
            out, _, lse = function(*tensors, **{**options, "update_cache": False})
            return out, function(*tensors, **options)[1], lse

        return call

    return _wrapped(subject, wrap)

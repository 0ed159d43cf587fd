"""Attention problems of a real model, the most extreme ones: stored once, solved by the kernels in every run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from properties.llama import activations

ROOT = Path(__file__).parents[1]
STORED = sorted((ROOT / "fixtures/activations").glob("*.json"))
SCHEMA = json.loads((ROOT / "fixtures/schema/activation.schema.json").read_text())


def test_each_kind_of_extreme_is_stored() -> None:
    kinds = {path.stem.partition("-")[2] for path in STORED}

    assert {"massive-key", "massive-value", "attention-sink", "wide-logits", "even-weights", "worst-error"} <= kinds


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_activation_follows_its_schema(path: Path) -> None:
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    read = activations.read(path)

    assert read.dumps() == path.read_text()
    assert read.key.shape == read.value.shape == (1, read.cached + 1, read.query.shape[2])


@pytest.mark.parametrize("fmt", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_activation_is_attended_within_its_budget(path: Path, fmt: str) -> None:
    problem = activations.read(path).rounded(fmt)
    exact, allowed = problem.expected()

    assert (np.abs(problem.solve() - exact) <= allowed).all()


def test_an_activation_with_another_value_is_seen() -> None:
    """The budgets are narrow enough: the last value of nearly even weights, its elements reversed, shows."""
    problem = activations.read(next(path for path in STORED if "even-weights" in path.stem))
    exact, allowed = problem.expected()
    problem.value[0, -1] = problem.value[0, -1, ::-1].copy()

    assert (np.abs(problem.solve() - exact) > allowed).any()


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"story": "short"}, {"scale": "0.125"}, {"fmt": "float16"}, {"query": {"shape": [1]}}, {"more": 1}],
    ids=str,
)
def test_the_schema_refuses(change: dict[str, Any]) -> None:
    record = json.loads(STORED[0].read_text()) | change

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record, SCHEMA)

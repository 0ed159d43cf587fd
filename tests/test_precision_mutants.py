"""A mutant that rounds by hand must round as its sentence says: another fault might die where this one would live."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from properties import device as devices
from properties.mutants.catalogue import select
from properties.mutants.mutant import PRIMITIVES, edited
from references.rounding import BFLOAT16, E4M3, FLOAT16, TFLOAT32, Format, Mode, round_to

COUNT = 1 << 14
KERNEL = """

@triton.jit
def round_all(out_ptr, x_ptr, COUNT: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, COUNT))
    tl.store(out_ptr + tl.arange(0, COUNT), {rounded})
"""


@pytest.mark.parametrize(
    ("mutant", "rounded", "fmt", "mode"),
    [
        ("F316", "float8_e4m3(x)", E4M3, "nearest"),
        ("F323", "truncated(x, tl.bfloat16)", BFLOAT16, "toward_zero"),
        ("F323", "truncated(x, tl.float16)", FLOAT16, "toward_zero"),
        ("F324", "tfloat32(x)", TFLOAT32, "toward_zero"),
    ],
)
def test_a_planted_rounding_is_that_of_its_format(
    mutant: str, rounded: str, fmt: Format, mode: Mode, tmp_path: Path
) -> None:
    path = tmp_path / "planted.py"
    path.write_text(edited(select([mutant])[0])[PRIMITIVES] + KERNEL.format(rounded=rounded))
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec is not None
    assert spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    rng = np.random.default_rng(0)
    ties = np.concatenate([np.arange(64) / 64, np.arange(64) * 2.0**-10])
    octaves = rng.random(COUNT - 130) * rng.choice((12, 40, 126), COUNT - 130)
    weights = np.concatenate([[2.0**-126, 1.0], ties, np.exp2(-octaves)]).astype(np.float32)

    x = torch.from_numpy(weights).to(devices.current())
    out = torch.empty_like(x)
    planted.round_all[(1,)](out, x, COUNT)

    assert np.array_equal(out.cpu().double().numpy(), round_to(weights, fmt, mode))

"""What the probe writes, and what it refuses to write."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from properties.probe import assemble
from properties.probing.accumulator import Accumulator
from references.arithmetic_model import HOPPER, INTERPRETER, ArithmeticModel

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "fixtures" / "models"

FUSED = Accumulator(16, 25, True, 23, "toward zero", True)
CHAIN = Accumulator(1, 40, True, 23, "not seen", False)


@dataclasses.dataclass
class Figures:
    """What `assemble` reads of the measurements."""

    exp2_error: float = 1.5e-7
    log2_error: float = 6e-8
    division_error: float = 1.5e-7
    exp2_flushes: bool = True
    flushes: bool = False
    contracts: bool = True


def test_the_least_accurate_unit_becomes_the_model() -> None:
    narrower = dataclasses.replace(FUSED, fused_products=8, fused_fraction_bits=13)
    found = {"float16": (FUSED, 1.0), "bfloat16": (narrower, 1.0), "float32": (CHAIN, float("nan"))}

    model = assemble(found, Figures(), HOPPER, "name", "where")

    assert (model.accumulator, model.fused_products, model.fused_fraction_bits) == ("fused", 8, 13)
    assert model.carried
    assert 1.5e-7 < model.exp2_error < 1.5000001e-7
    assert model.division_error == HOPPER.division_error  # a sample does not tighten a bound
    assert model.flush_to_zero  # nor does a product say what happens inside the unit


def test_a_sample_refutes_a_documented_bound() -> None:
    model = assemble({"float16": (FUSED, 1.0)}, Figures(division_error=1e-6), HOPPER, "name", "where")
    assert model.division_error == 1e-6


def test_without_a_fused_unit_the_model_is_ieee() -> None:
    model = assemble({"float16": (CHAIN, float("nan"))}, Figures(), INTERPRETER, "name", "where")
    assert model.accumulator == "ieee"
    assert model.exp2_error == INTERPRETER.exp2_error


def test_a_unit_that_its_model_does_not_reproduce_gets_none() -> None:
    with pytest.raises(ValueError, match=r"float16 must agree .* got 99\.0000%"):
        assemble({"float16": (FUSED, 0.99)}, Figures(), HOPPER, "name", "where")


@pytest.mark.parametrize("path", sorted(STORED.glob("*.measured.json")), ids=lambda path: path.stem)
def test_stored_models_follow_from_their_measurements(path: Path) -> None:
    model = ArithmeticModel.from_json(path.with_name(path.name.replace(".measured", "")).read_text())
    record = json.loads(path.read_text())
    units = record["accumulators"].values()
    fused = [unit for unit in units if unit["agreement"] is not None]

    assert model.provenance == record["provenance"]
    assert all(unit["agreement"] == 1.0 for unit in fused)
    assert [model.fused_products] * len(fused) == [unit["fused_products"] for unit in fused]
    assert (model.accumulator == "fused") == bool(fused)
    assert model.exp2_error >= record["elementary"]["exp2_error"]
    assert record["elementary"]["exp2_exact"]
    assert record["elementary"]["log2_exact"]
    assert record["elementary"]["division_exact_by_powers"]


def test_the_interpreter_computes_as_its_stored_model_says(tmp_path: Path) -> None:
    out = tmp_path / "model.json"
    command = [sys.executable, "-m", "properties", "probe", "--out", str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)

    found, stored = (ArithmeticModel.from_json(path.read_text()) for path in (out, STORED / "interpreter.json"))
    measured = json.loads((tmp_path / "model.measured.json").read_text())["elementary"]

    assert dataclasses.replace(found, provenance=stored.provenance) == stored
    assert dataclasses.replace(INTERPRETER, provenance=stored.provenance) == stored
    assert measured["exp2_exact"]
    assert measured["log2_exact"]
    assert measured["division_exact"]
    assert measured["exp2_error"] <= INTERPRETER.exp2_error

"""Small versions of the experiments in properties/numerics, and proof that their oracles can object."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from properties.mutants.catalogue import select
from properties.numerics import on_device, planted_faults
from properties.numerics.noise_baselines import noise_of
from properties.numerics.oracles import LATTICE_CASES, Kernel, Seen, caught_by, lattice_differs, look
from properties.numerics.precision_faults import clean_run, simulated
from properties.numerics.report import publish
from properties.numerics.validate import FORMATS, MODELS, Experiment, main, measure, plan, utilisation
from references.arithmetic_model import BLACKWELL, HOPPER, INTERPRETER, PERMISSIVE, ArithmeticModel
from references.error_bounds import budget, tiling
from references.noise import BASELINES, NoisePool, baseline_chi, predicted_sigma
from references.simulator import FAULTS, Fault, simulate
from tests.command_line import ROOT, environment

NARROW = [fault for fault in FAULTS if fault != "tf32"]
NARROW_PARTIALS = dataclasses.replace(
    INTERPRETER, name="partials as inputs, merged twice", merge="lse twice", partial_format=None, row_sum_from_p=True
)
# Where each fault shows with little data; the full table is `python -m properties.numerics.precision_faults`.
SHAPES = [("gauss", 200), ("large_logits", 200), ("level", 512)]


def test_the_gate_holds_and_is_nearly_attained() -> None:
    worst = dict.fromkeys(FORMATS, 0.0)
    for experiment in plan(220_000, seed=3):
        if experiment.kv_len > 9000:
            continue
        outcome = measure(experiment, MODELS[experiment.model], with_alarm=False)
        assert outcome.out.max() <= 1, experiment
        assert outcome.lse.max() <= 1, experiment
        worst[experiment.fmt] = max(worst[experiment.fmt], outcome.out.max())
    assert worst["float16"] >= 0.9
    assert worst["bfloat16"] >= 0.9


@pytest.mark.parametrize(
    "model",
    [
        PERMISSIVE,
        BLACKWELL,
        ArithmeticModel.from_json((BASELINES.parent / "models" / "nvidia_h200.json").read_text()),
        dataclasses.replace(HOPPER, name="Hopper merging by lse", merge="lse"),
        dataclasses.replace(INTERPRETER, name="row sum from P", row_sum_from_p=True),
        NARROW_PARTIALS,
    ],
    ids=lambda model: model.name,
)
def test_the_gate_holds_for_other_arithmetics(model: ArithmeticModel) -> None:
    for experiment in plan(60_000, seed=11):
        outcome = measure(experiment, model, with_alarm=False)
        assert outcome.out.max() <= 1, experiment
        assert outcome.lse.max() <= 1, experiment


def test_the_gate_is_violated_by_a_kernel_that_truncates_p() -> None:
    """Validation can fail: the same simulator, with another arithmetic than the one it is judged by."""
    truncating = dataclasses.replace(HOPPER, p_rounding="toward_zero")
    experiment = Experiment("coherent", "bfloat16", "Hopper", 65, 64, 64, None, True, "blas", "nominal", False, 0)

    assert measure(experiment, truncating, with_alarm=False).out.max() <= 1
    assert measure(experiment, truncating, claimed=HOPPER, with_alarm=False).out.max() > 1


@pytest.mark.parametrize(
    "experiment",
    [
        Experiment("large_logits", "bfloat16", "", 127, 80, 32, 64, True, "reverse", "nominal", True, 0),
        Experiment("subnormal", "float16", "", 1024, 80, 32, 128, False, "blas", "nominal", False, 0),
    ],
    ids=lambda experiment: experiment.family,
)
def test_the_gate_is_violated_by_a_kernel_that_stores_narrower_partials(experiment: Experiment) -> None:
    wider = dataclasses.replace(NARROW_PARTIALS, partial_format="float32")

    assert measure(experiment, NARROW_PARTIALS, with_alarm=False).out.max() <= 1
    assert measure(experiment, NARROW_PARTIALS, claimed=wider, with_alarm=False).out.max() > 1


def test_the_gate_counts_every_time_that_a_partial_is_stored() -> None:
    """By hand, in units of the last place: means of 9/16, 57/16 and 25/16 are stored as 1, 4 and 2, the mean of the
    first and last as 2, and the result, 8/3, as 3: 1.1 units above 91/48."""
    units = np.concatenate([np.arange(16) < 9, 3 + (np.arange(16) < 9), 1 + (np.arange(16) < 9)])
    value = (1 + 2.0**-10 * units)[None, :, None]
    nothing, seen = np.zeros((1, 48, 1)), np.ones((1, 48), bool)
    options: dict[str, Any] = {"scale": 1.0, "fmt": "float16", "tiles": tiling(48, 0, 16, 16)}

    out, _ = simulate(nothing[:, :1], nothing, value, seen, model=NARROW_PARTIALS, **options)
    allowed = budget(nothing[:, :1], nothing, value, seen, model=NARROW_PARTIALS, **options).out
    once = dataclasses.replace(NARROW_PARTIALS, merge="lse")

    assert out.item() == 1 + 3 * 2.0**-10
    error = out - value.mean()
    assert error <= allowed
    assert error > budget(nothing[:, :1], nothing, value, seen, model=once, **options).out


def test_validation_reports_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--outputs", "20000", "--families", "gauss", "coherent"]) == 0
    assert "| float16 | gauss |" in capsys.readouterr().out


def test_the_gate_holds_for_the_shipped_kernels_and_not_for_a_wrong_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--outputs", "12000"]
    assert on_device.main(arguments) == 0
    assert "| float16 |" in capsys.readouterr().out

    monkeypatch.setattr(on_device, "shipped", lambda fmt: simulated(fmt, INTERPRETER, "p_fp8"))

    assert on_device.main(arguments) == 1
    assert "VIOLATION" in capsys.readouterr().err


def test_the_command_for_the_device_at_hand_chooses_it_before_triton_is_imported() -> None:
    variables = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "properties.numerics.on_device", "--outputs", "1"]

    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("fmt", ["bfloat16", "float16"])
@pytest.mark.parametrize("fault", NARROW)
def test_every_planted_fault_is_caught(fault: Fault, fmt: str) -> None:
    kernel = simulated(fmt, HOPPER, fault)
    caught = sum(lattice_differs(kernel, seed) for seed in range(LATTICE_CASES)) > 0
    caught = caught or bool(caught_by(look(kernel, SHAPES), kernel))
    assert caught


def test_tf32_is_caught_on_float32_inputs() -> None:
    kernel = simulated("float32", HOPPER, "tf32")
    assert caught_by(look(kernel, [("gauss", 200)]), kernel)


def test_every_fault_of_the_simulator_is_planted_in_the_source() -> None:
    assert set(planted_faults.PLANTED) == set(FAULTS)
    mutants = [select([planted_faults.PLANTED[fault]])[0] for fault in FAULTS]
    assert all(not mutant.of_the_suite and not mutant.neutral for mutant in mutants)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_shipped_source_raises_no_oracle_and_a_wrong_one_does(fmt: str) -> None:
    clean = planted_faults.shipped(fmt)

    def attend(*arguments: Any) -> Any:
        out, lse = clean.attend(*arguments)
        return out * (1 + 2.0**-5), lse * (1 + 2.0**-14)

    broken = Kernel(fmt, clean.model, attend)
    shapes = [("gauss", 200), ("level", 200)]
    assert caught_by(look(clean, shapes), clean) == []
    assert not any(lattice_differs(clean, seed) for seed in range(4))
    assert {"gate out", "gate lse", "alarm"} <= set(caught_by(look(broken, shapes), broken))
    assert lattice_differs(broken, 0)


@pytest.mark.parametrize(("blind_to", "status"), [("nothing", 0), ("p_fp8", 1), (None, 1)])
def test_a_planted_fault_that_escapes_fails_the_run(
    blind_to: str | None, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``blind_to`` None: the source without a fault raises an oracle."""

    def seen_in(fault: Fault | None, fmt: str) -> Seen:
        objects = fault != blind_to if fault is not None else blind_to is None
        return Seen(("0",), (), ("alarm",) if (objects and fmt != "float32") or fault == "tf32" else ())

    monkeypatch.setattr(planted_faults, "seen_in", seen_in)
    assert planted_faults.main([]) == status
    printed = capsys.readouterr().out
    assert "| p_fp8 | F316, primitives.py: weights are rounded to 8 bits" in printed
    assert ("none" if status == 0 else f"{blind_to or 'none'} in bfloat16") in printed.splitlines()[-1]


@pytest.mark.parametrize("run", range(9))
def test_a_clean_kernel_raises_nothing(run: int) -> None:
    assert clean_run(run) == []


def test_stored_baselines_are_those_of_the_simulator() -> None:
    found = noise_of(HOPPER, "bfloat16", lengths=(64, 1024), cases=20)
    assert found.alarms(baseline_chi("Hopper", "bfloat16", 1024)) == []
    assert found.chi == pytest.approx(baseline_chi("Hopper", "bfloat16", 1024), rel=0.04)
    with pytest.raises(ValueError, match=BASELINES.name):
        baseline_chi("Hopper", "float32", 1024)


def pool(factor: float = 1.0, shift: float = 0.0, rows: int = 128) -> Any:
    """r is standard normal, times factor, plus shift in the direction of the reference."""
    rng = np.random.default_rng(0)
    reference, sigma = rng.standard_normal((rows, 32)), np.full((rows, 32), 0.01)
    r = factor * rng.standard_normal((rows, 32)) + shift * np.sign(reference)
    noise = NoisePool()
    noise.add(reference + sigma * r, reference, sigma)
    return noise


def test_noise_objects_to_excess_bias_and_outliers_and_to_nothing_else() -> None:
    assert pool().statistics().alarms(1.0) == []
    assert "chi is 1.2" in pool(factor=1.2).statistics().alarms(1.0)[0]
    assert "bias z is -" in pool(shift=-0.2).statistics().alarms(1.0)[0]
    few = NoisePool()
    few.add(np.array([0.07]), np.array([0.0]), np.array([0.01]))
    assert few.statistics().alarms(1.0) == ["largest |r| is 7, above 6"]


def test_noise_cannot_pass_nan_wrong_shapes_or_nothing() -> None:
    one = np.ones((2, 3))
    nan = NoisePool()
    nan.add(np.full((2, 3), np.nan), one, one)
    assert nan.statistics().alarms(1.0) == ["largest |r| is inf, above 6"]
    unseen = NoisePool()
    unseen.add(one * 1e-30, one * 0, one * 0)
    assert unseen.statistics().largest == np.inf
    with pytest.raises(ValueError, match="one shape"):
        NoisePool().add(one, np.ones((3, 2)), one)
    with pytest.raises(ValueError, match="reference must be finite"):
        NoisePool().add(one, one * np.nan, one)
    with pytest.raises(ValueError, match="empty pool"):
        NoisePool().statistics().alarms(1.0)
    with pytest.raises(ValueError, match="must be narrower"):
        predicted_sigma(one[None], one[None], one[None], np.ones((2, 2), bool), scale=1.0, fmt="float32", model=HOPPER)


def test_pools_merge_to_the_pool_of_all() -> None:
    both, second = pool(), pool(factor=2.0)
    both.merge(second)
    assert both.statistics().outputs == 2 * second.statistics().outputs
    assert both.statistics().chi == pytest.approx(np.sqrt((1 + 4) / 2), rel=0.03)


def test_utilisation_cannot_pass_what_is_not_a_number() -> None:
    assert utilisation(np.array([0.0]), np.array([0.0]))[0] == 0
    assert utilisation(np.array([1e-300]), np.array([0.0]))[0] == np.inf
    assert utilisation(np.array([np.nan]), np.array([1.0]))[0] == np.inf
    assert utilisation(np.array([1.0]), np.array([np.nan]))[0] == np.inf


def test_a_query_that_sees_no_key_is_zero_and_minus_infinity() -> None:
    one = np.ones((1, 2, 4))
    visible = np.array([[False, False], [True, False]])
    out, lse = simulate(one, one, one, visible, scale=1.0, fmt="float16", model=HOPPER, tiles=(((0, 1),), ((1, 2),)))
    assert out[0].tolist() == [[0.0] * 4, [1.0] * 4]
    assert lse[0, 0] == -np.inf
    assert lse[0, 1] == pytest.approx(4.0)


def test_publish_replaces_its_block_and_needs_one(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- t -->\nold\n<!-- end of t -->\nafter\n")
    publish("t", "new", page)
    assert page.read_text() == "before\n<!-- t -->\n\nnew\n\n<!-- end of t -->\nafter\n"
    with pytest.raises(ValueError, match="must have one block"):
        publish("u", "new", page)

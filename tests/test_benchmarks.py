"""The benchmark programs' own arithmetic, files and refusals; nothing here asserts how long anything takes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import benchmark_kv_cache, benchmark_suite, machine, report, section_times, shapes, targets
from benchmarks.clock import Clock
from benchmarks.report import ResultError, Results, Row
from benchmarks.seed_suite import verdict
from benchmarks.shapes import Shape
from benchmarks.timing import summarise, time_on_host
from properties import laws, runner, subjects

ROOT = Path(__file__).resolve().parents[1]
SEED = Shape(16, 8, 8, 64, 2048)
REQUIRED = {"suite", "case", "us", "bytes", "fraction_of_copy", "peers"}
HEADER: dict[str, Any] = {
    "gpu": "Example GPU",
    "driver": "1.2",
    "versions": {"torch": "2"},
    "date": "2026-01-01T00:00:00+00:00",
    "commit": "abc",
    "copy_tb_s": 3.0,
    "read_tb_s": 3.1,
    "matmul_tflops": 700.0,
    "figure_of_merit": True,
}


def row(suite: str = "decode", us: float | None = 25.0, shape: Shape = SEED, **changes: Any) -> Row:
    """A row of a shape."""
    fraction = None if us is None else shape.bytes() / us / 1e6 / 3.0
    made = Row(suite, shape.name, us, shape.bytes(), fraction, {"cudnn": 26.0, "flash": 31.0}, shape=shape.record())
    made.floor_us = shapes.bytes_floor_us(shape.bytes(), 3.0)
    return dataclasses.replace(made, **changes)


# -- shapes and floors -------------------------------------------------------------------------------------------


def test_the_seed_shape_moves_64_mib_and_its_floor_is_22_us() -> None:
    assert SEED.bytes() == 67_108_864
    assert shapes.bytes_floor_us(SEED.bytes(), 3.0) == pytest.approx(22.37, abs=0.005)


def test_bytes_count_valid_slots_and_for_prompts_queries_and_output_too() -> None:
    assert Shape(2, 4, 2, 8, 100, "bfloat16").kv_bytes([1, 100]) == 2 * 101 * 2 * 8 * 2
    assert Shape(1, 4, 2, 8, 10, "float32", q_len=10).bytes() == 4 * 8 * 10 * (2 * 2 + 2 * 4)


def test_operations_count_visible_pairs_only() -> None:
    causal = Shape(1, 1, 1, 1, 6, q_len=3, is_causal=True)  # 4 + 5 + 6 visible keys

    assert causal.visible_pairs() == 15
    assert causal.flops() == 60
    assert dataclasses.replace(causal, is_causal=False).visible_pairs() == 18
    assert shapes.flops_floor_us(7e8, 700.0) == pytest.approx(1.0)


def test_rotating_sets_exceed_the_cache() -> None:
    assert shapes.rotations(4_000_000, 50_000_000) * 4_000_000 >= 4 * 50_000_000
    assert shapes.rotations(1 << 40, 50_000_000) == 2
    assert shapes.rotations(1, 50_000_000, most=24) == 24


def test_the_grid_has_every_cell_once() -> None:
    grid = shapes.decode_shapes(quick=False)

    assert len({shape.name for shape in grid}) == len(grid) == 11 * 9 * 2
    assert {shape.kv_len for shape in grid} == {2**k for k in range(7, 16)}
    prompts = shapes.prefill_shapes(quick=False)
    assert len({shape.name for shape in prompts}) == len(prompts) == 5 * 2 * 2 * 2
    assert {shape.kv_len for shape in shapes.chunk_shapes(quick=False)} == {8192 + 512}
    for few, many in ((shapes.decode_shapes(True), grid), (shapes.prefill_shapes(True), prompts)):
        assert 0 < len(few) < len(many)
        assert set(few) <= set(many)


@pytest.mark.parametrize("distribution", shapes.DISTRIBUTIONS)
def test_ragged_lengths_are_in_range_reach_the_longest_and_are_the_same_every_time(distribution: str) -> None:
    lengths = shapes.ragged_lengths(distribution, 64, 4096)

    assert lengths == shapes.ragged_lengths(distribution, 64, 4096)
    assert min(lengths) >= 1
    assert max(lengths) == 4096
    assert len(set(lengths)) > 32
    if distribution == "bimodal":
        assert sorted(lengths)[-4:] == [4096] * 4
        assert sorted(lengths)[-5] <= 256


def test_an_unknown_distribution_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^distribution must be one of uniform, bimodal, geometric, got 'cauchy'$"):
        shapes.ragged_lengths("cauchy", 2, 16)


@pytest.mark.parametrize(
    ("num_bytes", "us", "words"),
    [
        (67_108_864, 25.0, "under 10 us would need 6.7 TB/s: out of reach of any kernel on this GPU"),
        (16_777_216, 8.0, "under 10 us: met"),
        (16_777_216, 12.0, "under 10 us: possible, and missed"),
    ],
)
def test_the_verdict_follows_from_bytes_bandwidth_and_time(num_bytes: int, us: float, words: str) -> None:
    said = verdict("case", num_bytes, us, 3.0)

    assert said.endswith(words)
    assert f"{100 * num_bytes / 3e6 / us:.0f} % of copy bandwidth" in said


# -- clocks ------------------------------------------------------------------------------------------------------


def test_a_summary_is_the_median_with_its_quartiles() -> None:
    timing = summarise([4.0, 1.0, 2.0, 3.0, 100.0])

    assert (timing.us, timing.low, timing.high, timing.samples) == (3.0, 2.0, 4.0, 5)
    assert timing.spread == pytest.approx(2 / 3)
    assert summarise([7.0]).us == 7.0


def test_the_budget_of_seconds_is_kept() -> None:
    times = iter([0.0, 0.0, 6.0, 6.0])
    clock = Clock(10.0, lambda: next(times))

    assert clock.fits(10.0)
    assert not clock.fits(5.0)
    assert clock.left() == 4.0
    assert Clock(None).left() == math.inf


def test_host_time_makes_the_calls_it_says() -> None:
    calls, waits = [], []
    timing = time_on_host(
        lambda: calls.append(1), warmup=2, samples=3, calls=5, synchronise=lambda: waits.append(len(calls))
    )

    assert len(calls) == 2 + 3 * 5
    assert waits == [2, 7, 7, 12, 12, 17, 17]
    assert timing.samples == 3


# -- results -----------------------------------------------------------------------------------------------------


def test_rows_have_the_promised_keys_and_a_file_gives_back_what_it_was_given(tmp_path: Path) -> None:
    results = Results(HEADER, [row(), row(us=None, peers={})], [{"suite": "decode", "case": "x", "reason": "late"}])
    results.save(tmp_path / "r.json")

    stored = json.loads((tmp_path / "r.json").read_text())
    assert all(stored_row.keys() >= REQUIRED for stored_row in stored["rows"])
    assert stored["header"].keys() >= {"gpu", "driver", "versions", "date", "commit"}
    assert Results.load(tmp_path / "r.json") == results
    assert os.listdir(tmp_path) == ["r.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"header": {}, "rows": [{"suite": "x"}], "not_run": []}', '{"rows": []}'])
def test_a_file_of_something_else_is_refused_in_a_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ResultError, match="must hold results of a benchmark"):
        Results.load(path)

    assert report.main([str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert report.main([str(tmp_path / "none.json")]) == 2


def test_merging_keeps_the_last_measurement_and_what_no_run_reached() -> None:
    first = Results(HEADER, [row(us=30.0)], [{"suite": "decode", "case": "x", "reason": "late"}])
    second = Results(HEADER, [row(us=25.0)], [{"suite": "decode", "case": SEED.name, "reason": "late"}])
    both = report.merged([first, second])

    assert [r.us for r in both.rows] == [25.0]
    assert both.not_run == first.not_run
    assert len(both.header["merged"]) == 2
    other = Results(HEADER | {"gpu": "Another"})
    with pytest.raises(ResultError, match="one kind of GPU, got Another, Example GPU"):
        report.merged([first, other])


def test_a_table_shows_time_bandwidth_floor_and_ratios() -> None:
    titles, cells = report.table_of([row(spread=0.01)])

    shown = dict(zip(titles, cells[0], strict=True))
    assert shown == {
        "case": "16,8,8,64,2048 float16",
        "us": "25.0",
        "+-%": "1.0",
        "MB": "67.1",
        "GB/s": "2684",
        "of copy": "89 %",
        "floor": "22.4",
        "x floor": "1.12",
        "cudnn us": "26.0",
        "flash us": "31.0",
        "cudnn x": "1.04",
        "flash x": "1.24",
    }
    text = report.plain(titles, cells)
    assert len({len(line) for line in text.splitlines()}) == 1


def test_stored_results_become_markdown_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = (512, 2048, 8192)
    rows = [row(us=n / 80, shape=dataclasses.replace(SEED, kv_len=n)) for n in lengths]
    rows[0].refused["flex"] = "no time left"
    missing = [{"suite": "decode", "case": "y", "reason": "no memory"}]
    Results(HEADER, rows, missing).save(tmp_path / "r.json")
    plot, merged = tmp_path / "p.png", tmp_path / "m.json"

    status = report.main([str(tmp_path / "r.json"), "--markdown", "--plot", str(plot), "--json", str(merged)])

    out = capsys.readouterr().out
    assert status == 0
    assert "| 16,8,8,64,8192 float16 | 102 |" in out
    assert "| decode against the best SDPA backend | >= 1 | 3 |" in out
    assert "no time for flex: no time left (1 of 3 cells)" in out
    assert "decode y: no memory" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert Results.load(merged).rows == rows


def test_nothing_to_draw_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Results(HEADER, [row("host")]).save(tmp_path / "r.json")

    assert report.main([str(tmp_path / "r.json"), "--plot", str(tmp_path / "p.png")]) == 2
    assert "there must be rows of the suites decode or seed to draw" in capsys.readouterr().err
    assert report.main([str(tmp_path / "r.json"), "--plot", str(tmp_path / "p.gif")]) == 2


def test_targets_are_judged_cell_by_cell_and_name_the_worst() -> None:
    small = Shape(16, 8, 1, 64, 2048)
    rows = [
        row(us=25.0),
        row(us=27.0, case="slow"),
        row(us=5.0, shape=small, peers={"cudnn": 7.0}),
        row("seed", us=24.0),
        row("seed", us=9.0, shape=Shape(16, 8, 2, 64, 2048)),
        row("host", us=11.0, notes={"us_target": 12.0}),
        row("memory", notes={"growth": 512, "workspace": 0.004}),
        row("prefill", shape=Shape(1, 1, 1, 64, 64, q_len=64, is_causal=True)),
    ]
    judged = {target.what: target for target in targets.judge(rows)}

    best = judged["decode against the best SDPA backend"]
    assert (best.count, best.met, best.where) == (3, 2, "slow")
    assert best.worst == pytest.approx(26 / 27)
    latency = judged["decode, <= 17 MB: over cuDNN's time"]
    assert latency.met == 1
    assert latency.worst == pytest.approx(5 / 7)
    assert judged["seed shape at 2048: over the floor"].met == 1
    assert judged["seed at 2048 with 2 kv heads: us"].worst == 9.0
    assert judged["host time of a decode call: us"].met == 1
    assert judged["growth over the decode steps: bytes"].met == 0
    assert judged["workspace: share of the cache"].met == 1
    assert judged["causal prefill, D 64, against cuDNN"].worst == pytest.approx(1.04)
    assert "ragged, valid bytes: of copy" not in judged


# -- the verification suite's own time ---------------------------------------------------------------------------


def test_a_second_counts_once_for_the_innermost_section() -> None:
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    stopwatch = section_times.Stopwatch("outside", lambda: next(times))
    with stopwatch.section("a"), stopwatch.section("b"):
        pass

    assert stopwatch.read() == {"outside": 1.0 + 5.0, "a": 2.0 + 4.0, "b": 3.0}


@pytest.fixture
def untouched() -> Iterator[None]:
    """Whatever is watched is itself again afterwards."""
    before = runner._Session._compare_bytes, subjects.active(), section_times.watched_functions()
    yield
    assert (runner._Session._compare_bytes, subjects.active(), section_times.watched_functions()) == before


@pytest.mark.usefixtures("untouched")
def test_a_law_is_split_into_its_sections_and_everything_is_put_back() -> None:
    name = "output_and_lse_lie_within_the_error_budget_at_every_step"
    found = benchmark_suite.explore_all({name: laws.discover()[name]}, seconds=60.0, seed=0, max_examples=3)
    shares = benchmark_suite.row_of("x", found).notes["shares"]

    assert found.cases == 3
    assert found.failed == ()
    assert set(shares) == set(section_times.SECTIONS)
    assert min(shares.values()) > 0
    assert sum(shares.values()) == pytest.approx(1)


# -- the programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "speed"], "invalid choice: 'speed'"),
        (["--seconds", "0"], "must be a positive number of seconds, got 0"),
        (["--peers", "torch"], "--peers must be auto, none or a list of"),
        (["--plot", "x.pdf"], "--plot must name a .png file, got x.pdf"),
        (["--json", "no/such/folder/x.json"], "no/such/folder must be a folder to write x.json to"),
    ],
)
def test_wrong_usage_is_exit_2_before_anything_is_measured(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark_kv_cache.main(arguments)

    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--workers", "-1"], "must be numbers of workers"), (["--law", "none"], "--law must name a law, got 'none'")],
)
def test_wrong_usage_of_the_suites_benchmark_is_exit_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark_suite.main(arguments)

    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_the_header_names_the_commit_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(machine.COMMIT_VARIABLE, raising=False)
    assert machine.commit(tmp_path) == "unknown"
    monkeypatch.setenv(machine.COMMIT_VARIABLE, "0123abc")
    assert machine.commit(tmp_path) == "0123abc"


def test_a_quick_run_without_a_gpu_fills_every_suite_and_says_what_it_is_worth(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/benchmark_kv_cache.py", "--quick", "--json", "r.json", "--plot", "p.png"],
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.count(report.NOT_A_MERIT) == 2
    results = Results.load(tmp_path / "r.json")
    assert {r.suite for r in results.rows} == set(benchmark_kv_cache.SUITES)
    assert results.not_run == []
    assert all(r.us for r in results.rows)
    assert results.header["figure_of_merit"] is False
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_call_is_timed_until_the_device_is_done_but_not_while_a_graph_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capturing, waits = iter((False, True)), []
    monkeypatch.setattr("properties.device.current", lambda: "cuda")
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: next(capturing))
    monkeypatch.setattr("torch.cuda.synchronize", lambda: waits.append(1))
    timed = section_times._finished(section_times.Stopwatch("rest"), lambda: 5)

    assert [(timed(), len(waits)) for _ in range(2)] == [(5, 1), (5, 1)]

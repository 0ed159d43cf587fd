"""``python -m properties verify`` from the outside: what it prints, what it writes, how it exits."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from properties import laws
from properties.__main__ import main
from tests.command_line import BROKEN, DIFFERENTIAL, NAIVE, ROOT, command, environment, properties


def test_a_correct_kernel_holds_and_the_table_says_so(tmp_path: Path) -> None:
    done = properties(
        "verify",
        "--subject",
        NAIVE,
        "--max-examples",
        6,
        "--seed",
        1,
        "-n",
        1,
        "--json",
        "result.json",
        folder=tmp_path,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.search(r"^device: .*torch \d", done.stdout, re.MULTILINE)
    assert re.search(
        rf"^{DIFFERENTIAL.replace('_', ' ')}.* \d+ +0\.\d+ +0\.\d+ +[\d.]+ s  holds$", done.stdout, re.MULTILINE
    )
    assert "all laws hold" in done.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["seed"] == 1
    assert all(law["cases"] >= 6 and law["verdict"] == "holds" for law in result["laws"])
    assert {law["law"] for law in result["laws"]} | set(result["not_offered"]) == set(laws.discover())
    assert set(result["not_offered"].values()) == {"declared arithmetic", "checked arguments", "device checks"}
    assert re.search(
        r"^permuting keys changes no bit on the lattice +0 .* not offered: declared arithmetic$", done.stdout, re.M
    )
    assert not (tmp_path / "fixtures").exists()


def test_a_broken_kernel_fails_with_its_smallest_case_and_files_that_show_it(tmp_path: Path) -> None:
    done = properties("verify", "--subject", BROKEN, "--law", DIFFERENTIAL, "--seconds", 40, "-n", 1, folder=tmp_path)

    assert done.returncode == 1, done.stdout + done.stderr
    assert "case: batch=1, cached=0, new=1, heads 1:1, head_dim=" in done.stdout
    assert "1 of 1 laws fail" in done.stdout
    replay = re.search(r"^  replay: python -m properties (replay \S+ --subject \S+)$", done.stdout, re.MULTILINE)
    script = re.search(r"^  script: python (\S+)$", done.stdout, re.MULTILINE)
    assert replay is not None
    assert script is not None

    again = properties(*replay[1].split(), folder=tmp_path)
    assert (again.returncode, again.stdout[:6]) == (1, "FAILED"), again.stdout + again.stderr
    fixed = properties(*replay[1].replace("broken", "naive").split(), folder=tmp_path)
    assert (fixed.returncode, fixed.stdout[:5]) == (0, "FIXED"), fixed.stdout + fixed.stderr

    promoted = properties(
        "promote", replay[1].split()[1], "--story", "Padding keys took part in the softmax", folder=tmp_path
    )
    target = tmp_path / "fixtures/regressions/0001-padding-keys-took-part-in-the.json"
    assert promoted.stdout.strip() == str(target.relative_to(tmp_path))
    first = properties("verify", "--subject", BROKEN, "--max-examples", 1, "--law", "append", "-n", 1, folder=tmp_path)
    assert first.returncode == 1
    assert "0001-padding-keys-took-part-in-the.json fails again" in first.stdout


def _documented(number: int) -> tuple[list[str], str]:
    """A command of docs/your-kernel.md and what it shows below it."""
    blocks = re.findall(
        r"^    python -m properties (verify .*)\n((?:    .*\n)*)",
        (ROOT / "docs/your-kernel.md").read_text(),
        re.MULTILINE,
    )
    words, shown = blocks[number]
    return words.split(), re.sub("^    ", "", shown, flags=re.MULTILINE)


def test_the_documented_first_command_looks_at_every_law_even_if_there_is_no_time(tmp_path: Path) -> None:
    words, _ = _documented(0)

    done = properties(*words, "--seconds", 0.001, "--json", "result.json", folder=tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "all laws hold of the 13 that can be judged" in done.stdout
    laws_tried = json.loads((tmp_path / "result.json").read_text())["laws"]
    assert {law["cases"] for law in laws_tried} == {1}


def test_the_documented_failure_is_what_its_command_finds(tmp_path: Path) -> None:
    words, shown = _documented(1)

    done = properties(*words, folder=tmp_path)

    assert done.returncode == 1, done.stdout + done.stderr
    found = re.sub(r"^FAILED after \d+ s", "FAILED after 4 s", done.stdout, flags=re.MULTILINE)
    assert shown.count("\n") == 7
    assert shown in found


def test_an_interrupt_ends_with_the_table_so_far(tmp_path: Path) -> None:
    run = subprocess.Popen(
        command("verify", "--subject", NAIVE, "--seconds", 60, "-n", 1),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever starts the tests in the background may have it ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert run.stdout is not None
    started = run.stdout.readline() + run.stdout.readline()
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=30)

    assert "device: " in started
    assert run.returncode == 130
    assert re.search(r"^law +cases", out, re.MULTILINE)
    assert "interrupted; no law failed so far" in out
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "--profile", "weekly"], "invalid choice: 'weekly'"),
        (["verify", "--max-examples", "0"], "must be at least 1, got 0"),
        (["verify", "--seconds", "-1"], "must be a positive number of seconds"),
        (["verify", "--seconds", "nan"], "must be a positive number of seconds"),
        (["replay"], "the following arguments are required: FILE"),
        (["promote", "x.json"], "the following arguments are required: --story"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_usage_is_exit_2_before_anything_starts(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)

    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--law", "no_such_law"], "--law must name a law, got 'no_such_law'"),
        (["--subject", "os"], "--subject must be package.module:name or one of flashcore, "),
        (["--subject", "no_such_module:f"], "--subject no_such_module:f cannot be imported"),
        (["--subject", "properties.case:no_such"], "properties.case has no no_such"),
    ],
)
def test_what_only_a_worker_can_know_is_one_line_too(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    subject = [] if "--subject" in arguments else ["--subject", NAIVE]
    status = main(["verify", "-n", "1", *subject, *arguments])
    out, err = capfd.readouterr()

    assert status == 2
    assert words in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in out + err

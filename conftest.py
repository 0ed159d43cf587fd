"""What every pytest run here shares: the device, the Hypothesis profiles, and what becomes of a failing case.

Run with ``--subject package.module:function`` to put another kernel under test, and with
``--hypothesis-profile dev|ci|nightly`` to choose how much is tried.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.errors import HypothesisException


def _own_gpu(environment: Any = os.environ) -> None:
    """Give each xdist worker a GPU of its own, before torch looks at them."""
    worker = re.fullmatch(r"gw(\d+)", environment.get("PYTEST_XDIST_WORKER", ""))
    if worker is None:
        return
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = [str(i) for i in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]
    else:
        gpus = [gpu for gpu in visible.split(",") if gpu]
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[int(worker[1]) % len(gpus)]


_own_gpu()
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")  # workers share the cores among them

from properties import device as devices  # noqa: E402 - after the environment is set
from properties.capabilities import NotOffered  # noqa: E402
from properties.needs import asked_by  # noqa: E402
from properties.strategies import sizes  # noqa: E402

DEVICE = devices.choose()

# No explain phase: it reruns a failing case many times to say less than the failure's own text does.
_phases = [phase for phase in Phase if phase is not Phase.explain]
_database = DirectoryBasedExampleDatabase(".hypothesis/examples")
_shared = settings(deadline=None, print_blob=False, phases=_phases)
settings.register_profile("dev", _shared, max_examples=20, database=_database)
settings.register_profile("ci", _shared, max_examples=30, derandomize=True, database=None)
settings.register_profile("nightly", _shared, max_examples=2000, database=_database)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--subject", default=None, help="kernel under test: flashcore, or package.module:function")


def pytest_configure(config: pytest.Config) -> None:
    from properties import subjects

    spec = config.getoption("--subject")
    try:
        subject = subjects.active() if spec is None else subjects.activate(spec)
    except subjects.SubjectError as error:
        raise pytest.UsageError(str(error)) from None
    if DEVICE == "cuda" and not subject.slow:
        os.environ.setdefault(sizes.VARIABLE, "large")


def pytest_report_header() -> list[str]:
    from properties import subjects

    subject = os.environ.get(subjects.VARIABLE, subjects.DEFAULT)
    return [f"device: {devices.describe(DEVICE)}", f"subject: {subject}"]


_failing_cases: dict[str, tuple[Any, Exception]] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out laws that the kernel does not owe; have each remember the case it failed on last, the smallest."""
    from properties import subjects

    subject = subjects.active()
    owed, others = [], []
    for item in items:
        law = getattr(item, "function", None)
        handle = getattr(law, "hypothesis", None)
        is_law = handle is not None and item.path.parent.name == "properties"
        if is_law and not all(subject.meets(need, DEVICE) for need in asked_by(law)):
            others.append(item)
            continue
        if is_law and handle is not None:
            handle.inner_test = _remembering(item.nodeid, handle.inner_test)
        owed.append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = owed


def _remembering(nodeid: str, check: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(check)
    def remembering(case: Any) -> None:
        try:
            check(case)
        except (HypothesisException, NotOffered):
            raise
        except Exception as error:
            _failing_cases[nodeid] = case, error
            raise

    return remembering


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """A law whose cases ask for what the kernel does not offer is no failure, and did not pass."""
    try:
        return (yield)
    except NotOffered as lacking:
        if pyfuncitem.path.parent.name != "properties":
            raise
        pytest.skip(f"not offered: {lacking}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Store the case of a law that failed, and print what to run, as verify does."""
    report: Any = yield
    if call.when == "call" and call.excinfo is not None and item.nodeid in _failing_cases:
        from properties import exploring, saving

        case, error = _failing_cases.pop(item.nodeid)
        name = getattr(item, "originalname", item.name).removeprefix("test_")
        report.sections.append(("failing case", saving.save(exploring.failure_of(name, case, error))))
    return report

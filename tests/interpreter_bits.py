"""What the kernels give on drawn cases in the interpreter, as digests; with or without the time-saving of flashcore.

    TRITON_INTERPRET=1 python -m tests.interpreter_bits CASES SEED [unknown]

``unknown``: as with a version of Triton that the time-saving does not know. ``tests/test_interpreter.py`` compares.
"""

from __future__ import annotations

import hashlib
import json
import sys

import triton

if "unknown" in sys.argv[1:]:
    triton.__version__ = "0.0.0"

from hypothesis import Phase, given, seed, settings
from triton.runtime import interpreter as upstream

from properties.case import Case
from properties.runner import run
from properties.strategies import cases


def digest(case: Case) -> str:
    """Of every output, log-sum-exp and cache buffer of the case's calls, and of what was found wrong."""
    found = hashlib.sha256()
    for step in run(case).steps:
        for bits in (step.got.out, step.got.lse) if step.got is not None else ():
            found.update(bits.tobytes())
        for buffer in (step.k_bits, step.v_bits):
            found.update(b"" if buffer is None else buffer.tobytes())
        found.update(repr((step.seq_lens, step.findings)).encode())
    return found.hexdigest()


def main(count: int, first: int) -> None:
    """Print the digests."""
    digests: dict[str, str] = {}

    @seed(first)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate])
    @given(case=cases(size="small"))
    def collect(case: Case) -> None:
        digests[case.to_json()] = digest(case)

    collect()
    print(json.dumps({"saves time": hasattr(upstream, "flashcore_saves_time"), "digests": digests}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

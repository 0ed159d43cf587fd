"""A sample of cases for compute-sanitizer, which slows a kernel down a hundredfold.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m properties.sanitizer_sample 40
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m properties.sanitizer_sample 40

Guards and fillings are off: the allocations are the kernel's own, so that a store beside one is seen. Cases in 16 bits
also run on each kernel that may be forced. Set ``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` to have every tensor in an
allocation of its own.
"""

from __future__ import annotations

import dataclasses
import sys

from hypothesis import Phase, given, settings

from properties import device as devices
from properties import subjects
from properties.case import Case
from properties.runner import run
from properties.strategies import cases
from properties.variants import for_every_kernel


def main(count: int) -> None:
    """Run that many cases, always the same ones."""
    print(devices.describe(devices.choose()))
    subject = dataclasses.replace(subjects.active(), allocators=())
    done = 0

    @settings(
        max_examples=count, derandomize=True, deadline=None, database=None, phases=[Phase.generate], print_blob=False
    )
    @given(case=cases(size="small"))
    def sample(case: Case) -> None:
        nonlocal done
        run(case, subject, poisoned=False).outputs  # noqa: B018 - a call that should have returned did
        for forced in subject.paths.values() if case.dtype != "float32" else ():
            run(for_every_kernel(case), subjects.forced_to(subject, forced), poisoned=False).outputs  # noqa: B018
        done += 1

    sample()
    print(f"{done} cases run")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)

"""When pooled errors are no longer rounding noise; imports neither torch nor a kernel."""

from __future__ import annotations

from references.noise import CHI_MARGIN, LARGEST_R, LARGEST_Z, NoiseStatistics, baseline_chi

LONGEST_KV = 1024
"""Keys of the longest problem pooled; chi has one baseline up to it."""


def clean_chi(fmt: str, model: str) -> float | None:
    """chi of a clean kernel of this arithmetic, or None if nothing is known of it."""
    try:
        return baseline_chi(model, fmt, LONGEST_KV)
    except ValueError:
        return None


def judge(statistics: NoiseStatistics, chi: float) -> tuple[float, list[str]]:
    """How much of what noise may do was used (1 is the limit), and a sentence for each limit passed."""
    used = max(statistics.largest / LARGEST_R, statistics.chi / (CHI_MARGIN * chi), abs(statistics.bias) / LARGEST_Z)
    return used, statistics.alarms(chi)

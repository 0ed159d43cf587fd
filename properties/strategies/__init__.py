"""Cases drawn by Hypothesis, and what they reach. Never imports torch or a kernel."""

from properties.strategies.cases import cases
from properties.strategies.events import REGIONS, aim, describe, record

__all__ = ["REGIONS", "aim", "cases", "describe", "record"]

"""Cases drawn by Hypothesis, and what they reach. Never imports torch or a kernel."""

from properties.strategies.cases import cases

__all__ = ["cases"]

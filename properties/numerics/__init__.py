"""Experiments behind docs/numerics.md: validation of the budget, planted precision faults, plots, baselines.

Each is a command (`python -m properties.numerics.validate`, ...) that prints the table it is quoted with.
"""

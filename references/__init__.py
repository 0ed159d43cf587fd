"""The oracle: float64 attention, the cache as slots, number formats and error budgets.

NumPy and the standard library only, and nothing shared with the kernels: no code, no constant, no trick.
"""

"""What `python -m properties probe` measures: accumulators, elementary functions, casts."""

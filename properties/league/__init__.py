"""``python -m properties league``: which kernel is the most accurate, on equal problems and in units of one budget."""

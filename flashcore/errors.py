"""Exceptions that callers of flashcore may want to catch by name."""

from __future__ import annotations


class CacheOverflowError(RuntimeError):
    """New tokens would not fit in the cache; nothing was launched and nothing was written."""

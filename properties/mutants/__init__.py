"""Planted faults: how strong the laws are is how many of these they kill."""

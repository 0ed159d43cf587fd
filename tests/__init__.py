"""Examples, and tests of the suite itself."""

"""Benchmark of gdn2 against the token scan."""

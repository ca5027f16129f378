"""Benchmarks: what the project claims to be fast, measured."""

"""Kernels of windowed attention with segments."""

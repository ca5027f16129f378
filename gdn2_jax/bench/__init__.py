"""Benchmarks of the op, of the GPU kernels and of serving."""

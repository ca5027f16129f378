"""Ahead-of-time check: kernels and the training step, compiled for an H100."""

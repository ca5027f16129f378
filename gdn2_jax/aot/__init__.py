"""Compilation of kernels and of the training step for an H100."""

"""Shared by ops and GPU kernels: target, choice of a kernel, self-check."""

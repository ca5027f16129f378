"""Pallas (Mosaic GPU) kernels for NVIDIA Hopper, derived in README.md."""

"""Pallas (Mosaic GPU) kernels for NVIDIA Hopper; README.md derives them."""

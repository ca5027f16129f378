"""Triton kernels for NVIDIA GPUs of compute capability 8.0 and newer.

They are called through jax_triton, an optional extra, and need nothing of
Hopper's. They run one token, or a short sequence token by token, and have no
gradient: "xla" is the implementation for training and for long sequences on
these GPUs. Importing this package imports neither triton nor jax_triton.
"""

"""Triton kernels for NVIDIA GPUs of compute capability 8.0 and newer.

They are called through jax_triton, an optional extra, and need nothing of
Hopper's. They run one token, or a short sequence token by token, and have no
gradient: "xla" is the implementation for training and for long sequences on
these GPUs. Importing this package imports neither triton nor jax_triton.

What has been checked, all of it without a GPU: in Triton's interpreter the
kernels agree with a float64 recurrence (tools/check_triton_kernels.py); they
compile for compute capabilities 8.0, 8.9 and 12.0 without spills (make aot);
and jax_triton lowers them under jit, vmap and shard_map, with a donated state
updated in place. They have not been run, nor timed, on a GPU.
"""

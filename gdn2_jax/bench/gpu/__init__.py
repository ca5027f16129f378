"""GPU benchmark: kernels checked and timed, then the training step."""

"""Training: configuration, optimizer, step, checkpoints and the loop."""

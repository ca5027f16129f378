"""Comparison of mixers with seeds, learning rates and stated claims."""

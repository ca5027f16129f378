"""Whole programs compiled ahead of time: training and decoding steps."""

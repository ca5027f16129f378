"""Synthetic memory tasks with known answers."""

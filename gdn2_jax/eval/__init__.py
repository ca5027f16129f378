"""Evaluations: held-out loss at several lengths, n-gram baselines."""

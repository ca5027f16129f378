"""Ablations of GDN-2: one setting each, with its parameters, state and recipe.

Sizes, recipes and rules are those of configs/baselines.
"""

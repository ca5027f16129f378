"""Layers that mix tokens, and the registry of their letters."""

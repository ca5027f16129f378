"""Memories without a layer around them."""

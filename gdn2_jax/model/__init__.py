"""Flax linen model family: mixers, block, language model."""

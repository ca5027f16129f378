"""Flax linen models: mixers, blocks, language model."""

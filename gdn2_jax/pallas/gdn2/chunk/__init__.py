"""Stages of the kernels that work within a chunk, with tokens in rows."""

"""Weights under the names of other programs: there, back and across.

`python -m gdn2_jax.convert --help` says what it takes.
"""

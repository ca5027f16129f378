"""Benchmarks: `python -m gdn2_jax.bench op`. They check before they time."""

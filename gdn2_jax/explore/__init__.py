"""Command `gdn2 explore`; the functions are in gdn2_jax.explorer."""

"""Trained models as folders: for this library, or for JAX alone."""

"""The layer, and any linen module of the package, as Flax NNX modules.

Only this package imports NNX.
"""

from gdn2_jax.nnx.bridge import GDN2, to_nnx

__all__ = ["GDN2", "to_nnx"]

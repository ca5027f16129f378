"""Kernels of the GDN-2 op, over chunks and for one token."""

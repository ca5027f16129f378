"""Kernels of the GDN-2 op: chunks, scan over chunks, one token."""

"""Model of the time that compiled kernels take on an H100."""

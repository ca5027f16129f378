"""Choice among GPU kernels: device, call, and a self-check."""

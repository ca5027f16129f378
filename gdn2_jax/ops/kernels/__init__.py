"""Choice among GPU kernels, by device and call."""

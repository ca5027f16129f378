"""Names that the parent and the parts share; imports nothing."""

# The peers come last, because their autotuning takes minutes.
PARTS = ("check", "time", "step", "peers")
PEERS = ("fla gdn2", "fla kda")
OURS = ("mosaic_gpu", "xla")
COLUMNS = (*OURS, *PEERS)
DEVICE_LOST = 3  # exit code of a part: the next row needs a new process
NO_GPU = 4

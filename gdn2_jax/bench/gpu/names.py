"""Names that the parent and the parts share; imports nothing."""

PARTS = ("check", "time", "step")
COLUMNS = ("mosaic_gpu", "xla", "fla gdn2", "fla kda")
DEVICE_LOST = 3  # exit code of a part: the next row needs a new process
NO_GPU = 4

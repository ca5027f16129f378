"""Experiments: one file each, returning a TrainConfig from get_config()."""

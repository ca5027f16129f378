"""Starts the processes of a run on one host: `gdn2 launch`."""

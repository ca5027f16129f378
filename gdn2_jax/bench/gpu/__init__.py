"""The GPU benchmark: every kernel checked and timed, then the step."""

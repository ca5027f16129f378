"""Processes of a run: start, lock, watchdog, preemption."""

"""Exchanges between devices that hold different tokens of a sequence."""

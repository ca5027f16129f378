"""Exchanges between devices that hold shards of the tokens."""

"""Jitted prefill, decode and sampling with an explicit state."""

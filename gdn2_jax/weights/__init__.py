"""Weights as files: names, safetensors, published folders, programs."""

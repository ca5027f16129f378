"""Serving against a softmax transformer of the same size."""

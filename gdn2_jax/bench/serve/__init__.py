"""Benchmark of serving against a softmax transformer of the same size."""

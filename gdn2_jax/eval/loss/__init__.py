"""Loss on held-out text, beside n-gram models of the same tokens."""

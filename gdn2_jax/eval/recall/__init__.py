"""Recall from a prompt: the six tasks of the paper's Table 4, from files."""

"""Our results in the layout of the paper's tables, beside its numbers."""

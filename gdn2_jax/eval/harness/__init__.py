"""Tasks of lm-evaluation-harness (lm-eval), from local files or a cache."""

"""RULER's needle-in-a-haystack tasks: prompts, scores, tables."""

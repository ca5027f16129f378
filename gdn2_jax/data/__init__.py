"""Corpus, tokenizer, packed rows and the grain pipeline (numpy only)."""

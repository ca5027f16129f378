"""Conversations with a model: line by line, undone, forked, saved."""

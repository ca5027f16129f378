"""Evaluations of trained models, one command each, and their statistics."""

"""Recall of random associations: theory, measurement, figures."""

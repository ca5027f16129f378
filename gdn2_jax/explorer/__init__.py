"""Interactive explorer of the gates and states of a model over a text."""

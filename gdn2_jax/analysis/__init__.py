"""Gate dynamics: collected gates and states, half-lives, overwrites."""

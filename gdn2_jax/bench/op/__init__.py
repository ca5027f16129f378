"""The op against the token scan on a CPU."""

"""Files of states: snapshots, sessions and the prefix cache."""

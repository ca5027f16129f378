"""States as files: snapshots, sessions, a cache of prefixes."""

"""HTTP server for completions, on continuous batching (`docs/server.md`)."""

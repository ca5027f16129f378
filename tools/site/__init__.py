"""Documentation site: hooks of MkDocs and pinned requirements."""

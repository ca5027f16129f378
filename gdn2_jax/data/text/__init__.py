"""Sources of documents: corpora, files, FineWeb-Edu, TFDS."""

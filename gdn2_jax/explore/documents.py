"""Held-out documents of the package's frozen corpus, to choose from."""

import functools

from gdn2_jax.data.text import corpus

DEFAULT = "library/posixpath.py"


@functools.cache
def held_out() -> dict[str, str]:
  """Texts by name; models trained on the package's corpus never saw them."""
  documents = corpus.read_corpus("snapshot").documents
  _, kept = corpus.split_documents(documents)
  return {document.name: document.text for document in kept}

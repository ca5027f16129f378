"""Protocol of a sequence mixer, shared by every layer kind.

    y, cache = mixer(x, segment_ids, cache)

The same call serves training (no cache), prefill (T tokens) and decoding
(T = 1). A cache is an immutable pytree whose leaves have the batch axis first;
its size does not depend on the tokens that were read. Tokens with segment id 0
do not change the cache. Attention gets the cache of all its layers and the
index of its own (CacheLayer).
"""

from typing import Any, Protocol

from gdn2_jax.typing import Activations, SegmentIds

Cache = Any  # GDN2Cache | CacheLayer


class Mixer(Protocol):
  """Layer that mixes tokens, with a cache across calls."""

  def __call__(
    self, x: Activations, segment_ids: SegmentIds | None, cache: Cache | None
  ) -> tuple[Activations, Cache | None]:
    """Mixes T tokens per row; see the module's docstring."""
    ...

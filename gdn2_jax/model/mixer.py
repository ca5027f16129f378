"""Protocol of a sequence mixer, shared by every layer kind.

    y, cache = mixer(x, segment_ids, cache)

One call serves training (cache None in, None out), prefill (T tokens) and
decoding (T = 1). A cache is an immutable pytree whose leaves have the batch
axis first; its size does not depend on the tokens seen. Tokens with segment id
0 leave the cache as it was. Attention is given the cache of all its layers, and
is told which part is its own.
"""

from typing import Any, Protocol

from gdn2_jax.typing import Activations, SegmentIds

Cache = Any  # GDN2Cache | CacheLayer


class Mixer(Protocol):
  """Maps activations to activations, carrying a cache across calls."""

  def __call__(
    self, x: Activations, segment_ids: SegmentIds | None, cache: Cache | None
  ) -> tuple[Activations, Cache | None]:
    """Mixes T tokens per row; see the module's docstring."""
    ...

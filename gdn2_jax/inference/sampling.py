"""Choosing the next token: greedy, temperature, top-k and top-p.

Legend: B batch, VOCAB vocabulary, R ranks kept (most probable first).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """p(i) proportional to exp(logits_i / temperature) over the kept tokens.

  Tokens are ranked by logit, the lower id first among equals. Kept are the
  first `top_k` ranks, and of these the shortest prefix whose probability
  (softmax at this temperature over the top_k ranks) reaches `top_p`; the
  first rank is always kept. What is kept is renormalised. Hashable, so it
  can be a static argument of jit.

  Attributes:
    temperature: 0, which takes the first rank (greedy) whatever the rest, or
      at least 1e-6, below which float32 logits / temperature may overflow.
    top_k: ranks kept; 0 keeps all.
    top_p: in (0, 1]; 1 keeps all.
    vocab_size: ids from here on are never drawn; 0 draws from all. A model's
      vocabulary may be rounded up past its tokenizer's.

  Raises:
    ValueError: a value outside its range.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  vocab_size: int = 0

  def __post_init__(self):
    if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:
      raise ValueError(
        "temperature: expected 0 (greedy) or a finite number >= 1e-6, got "
        f"{self.temperature}"
      )
    if self.top_k < 0:
      raise ValueError(
        f"top_k: expected an integer >= 0 (0 = all), got {self.top_k}"
      )
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p: expected 0 < top_p <= 1, got {self.top_p}")
    if self.vocab_size < 0:
      raise ValueError(
        f"vocab_size: expected an integer >= 0 (0 = all), got {self.vocab_size}"
      )

  def check(self, vocab_size: int) -> None:
    """Raises ValueError if the model's vocabulary is too small for this."""
    if self.vocab_size > vocab_size:
      raise ValueError(
        f"sampler.vocab_size: expected at most the model's {vocab_size}, got "
        f"{self.vocab_size}"
      )
    vocab_size = self.vocab_size or vocab_size
    if self.top_k > vocab_size:
      raise ValueError(
        f"top_k: expected at most the vocabulary size {vocab_size}, got "
        f"{self.top_k}"
      )


GREEDY = Sampler(temperature=0.0)


def filter_logits(
  logits: Float[Array, "B VOCAB"], sampler: Sampler
) -> Float[Array, "B VOCAB"]:
  """Returns logits whose softmax is the distribution `sample` draws from.

  Args:
    logits: [B, VOCAB], any float dtype.
    sampler: what to keep, and the temperature.

  Returns:
    float32 [B, VOCAB]: logits / temperature up to a constant per row, -inf
    where not kept.

  Raises:
    ValueError: top_k is larger than VOCAB.
  """
  values_BR, ids_BR = _ranked(logits, sampler)
  rows_B1 = jnp.arange(logits.shape[0])[:, None]
  dropped = jnp.full(logits.shape, -jnp.inf, jnp.float32)
  return dropped.at[rows_B1, ids_BR].set(values_BR)


def sample(
  logits: Float[Array, "B VOCAB"],
  keys: Key[Array, " B"],
  sampler: Sampler,
) -> Int[Array, " B"]:
  """Draws one token per row, each row with its own key.

  A row's draw depends on that row's logits and key alone, so a sequence gets
  the same tokens in any batch.

  Args:
    logits: [B, VOCAB], any float dtype; computed in float32.
    keys: [B] typed keys; unused when greedy.
    sampler: the distribution.

  Returns:
    int32 [B] token ids.

  Raises:
    ValueError: top_k is larger than VOCAB.
  """
  if sampler.temperature == 0:
    known = _known(logits, sampler)
    return jnp.argmax(known, axis=-1).astype(jnp.int32)
  values_BR, ids_BR = _ranked(logits, sampler)
  ranks_B = jax.vmap(jax.random.categorical)(keys, values_BR)
  chosen_B1 = jnp.take_along_axis(ids_BR, ranks_B[:, None], axis=1)
  return chosen_B1[:, 0].astype(jnp.int32)


def _known(logits, sampler):
  """float32 logits of the ids that may be drawn."""
  sampler.check(logits.shape[-1])
  return logits[:, : sampler.vocab_size or None].astype(jnp.float32)


def _ranked(
  logits: Float[Array, "B VOCAB"], sampler: Sampler
) -> tuple[Float[Array, "B R"], Int[Array, "B R"]]:
  """Returns kept logits / temperature (-inf if dropped) and their ids."""
  logits = _known(logits, sampler)
  vocab_size = logits.shape[-1]
  if sampler.temperature == 0:
    best_B1 = jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.take_along_axis(logits, best_B1, axis=1), best_B1
  # Shifted first, so that a small temperature cannot give inf - inf.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  if sampler.top_k == 0 and sampler.top_p == 1:
    # Nothing to drop: spare the sort, any order of the ids will do.
    ids_BR = jnp.broadcast_to(jnp.arange(vocab_size)[None], logits.shape)
    return logits / sampler.temperature, ids_BR
  values_BR, ids_BR = jax.lax.top_k(logits, sampler.top_k or vocab_size)
  values_BR = values_BR / sampler.temperature
  if sampler.top_p < 1:
    p_BR = jax.nn.softmax(values_BR, axis=-1)
    # Mass of the more probable ranks: 0 for the first, so it always stays.
    before_BR = jnp.cumsum(p_BR, axis=-1) - p_BR
    first_BR = jnp.arange(values_BR.shape[-1])[None] == 0
    values_BR = jnp.where(
      (before_BR < sampler.top_p) | first_BR, values_BR, -jnp.inf
    )
  return values_BR, ids_BR

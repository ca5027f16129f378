"""Choosing the next token: greedy, temperature, top-k and top-p.

Legend: B batch, VOCAB vocabulary, R ranks kept (most probable first).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """Distribution p(i) ~ exp(logits_i / temperature) over the kept tokens.

  Tokens are ranked by logit, the lower id first among equals. Kept are the
  first `top_k` ranks, and of these the shortest prefix whose probability
  (softmax at this temperature over the top_k ranks) reaches `top_p`; the
  first rank is always kept. The kept ones are renormalised. A static argument
  for jit, which compiles once per sampler.

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


@struct.dataclass
class RowSamplers:
  """One sampler per row, as arrays: one compiled program serves all settings.

  Attributes:
    temperature, top_p: [B] float32.
    top_k, vocab_size: [B] int32; vocab_size is never 0 here.
  """

  # Any: tree transformations build samplers of other things than arrays.
  temperature: Any
  top_k: Any
  top_p: Any
  vocab_size: Any


def row_samplers(samplers: Sequence[Sampler], vocab_size: int) -> RowSamplers:
  """Stacks the samplers of B rows, on the host.

  Args:
    samplers: one sampler per row.
    vocab_size: vocabulary size of the model.

  Raises:
    ValueError: a top_k or vocab_size larger than the model's vocabulary.
  """
  for sampler in samplers:
    sampler.check(vocab_size)
  return RowSamplers(
    temperature=np.asarray([s.temperature for s in samplers], np.float32),
    top_k=np.asarray([s.top_k for s in samplers], np.int32),
    top_p=np.asarray([s.top_p for s in samplers], np.float32),
    vocab_size=np.asarray(
      [s.vocab_size or vocab_size for s in samplers], np.int32
    ),
  )


def filter_logits(
  logits: Float[Array, "B VOCAB"], sampler: Sampler
) -> Float[Array, "B VOCAB"]:
  """Returns logits whose softmax is the distribution `sample` draws from.

  Args:
    logits: [B, VOCAB], any float dtype.
    sampler: ranks to keep, and the temperature.

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
  sampler: Sampler | RowSamplers,
) -> Int[Array, " B"]:
  """Draws one token per row, each row with its own key.

  The most probable after adding Gumbel noise, of which every id gets its own
  amount from the key alone. So a row's draw depends on that row's logits, key
  and sampler alone, and a sequence gets the same tokens in any batch.

  Args:
    logits: [B, VOCAB], any float dtype; computed in float32.
    keys: [B] typed keys; unused when greedy.
    sampler: one for all rows, or one per row.

  Returns:
    int32 [B] token ids.

  Raises:
    ValueError: a top_k or vocab_size larger than VOCAB.
  """
  if isinstance(sampler, RowSamplers):
    return _sample_rows(logits, keys, sampler)
  if sampler.temperature == 0:
    return _first(_known(logits, sampler))
  values_BR, ids_BR = _ranked(logits, sampler)
  noise_BR = jnp.take_along_axis(_noise(keys, logits), ids_BR, axis=1)
  ranks_B = jnp.argmax(values_BR + noise_BR, axis=-1)
  chosen_B1 = jnp.take_along_axis(ids_BR, ranks_B[:, None], axis=1)
  return chosen_B1[:, 0].astype(jnp.int32)


def _noise(keys, logits):
  def draw(key):
    return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

  return jax.vmap(draw)(keys)


def _first(logits):
  """The most probable id of each row, the lower one among equals."""
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


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
    keep_BR = _nucleus(values_BR, jnp.asarray(sampler.top_p))
    values_BR = jnp.where(keep_BR, values_BR, -jnp.inf)
  return values_BR, ids_BR


def _sample_rows(logits, keys, samplers: RowSamplers):
  """`sample` with settings per row, known at run time only."""
  vocab_size = logits.shape[-1]
  unknown = jnp.arange(vocab_size)[None] >= samplers.vocab_size[:, None]
  logits = jnp.where(unknown, -jnp.inf, logits.astype(jnp.float32))
  greedy = samplers.temperature == 0
  shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
  scaled = shifted / jnp.where(greedy, 1.0, samplers.temperature)[:, None]
  ranks_matter = ~greedy & ((samplers.top_k > 0) | (samplers.top_p < 1))
  # Sorting a vocabulary costs more than all the rest: only if it is needed.
  kept = jax.lax.cond(
    ranks_matter.any(), _drop_ranks, lambda x, _: x, scaled, samplers
  )
  drawn = _first(kept + _noise(keys, logits))
  return jnp.where(greedy, _first(logits), drawn)


def _drop_ranks(values, samplers):
  """Replaces by -inf the ids that top_k and top_p do not keep."""
  vocab_size = values.shape[-1]
  values_BR, ids_BR = jax.lax.top_k(values, vocab_size)
  ranks_BR = jnp.broadcast_to(jnp.arange(vocab_size)[None], values.shape)
  top_k = jnp.where(samplers.top_k == 0, vocab_size, samplers.top_k)
  values_BR = jnp.where(ranks_BR < top_k[:, None], values_BR, -jnp.inf)
  keep_BR = _nucleus(values_BR, samplers.top_p[:, None])
  values_BR = jnp.where(keep_BR, values_BR, -jnp.inf)
  rows_B1 = jnp.arange(values.shape[0])[:, None]
  return jnp.zeros_like(values).at[rows_B1, ids_BR].set(values_BR)


def _nucleus(values_BR, top_p):
  """True for the ranks of the shortest prefix that reaches top_p."""
  p_BR = jax.nn.softmax(values_BR, axis=-1)
  # Mass of the more probable ranks: 0 for the first, so it always stays.
  before_BR = jnp.cumsum(p_BR, axis=-1) - p_BR
  first_BR = jnp.arange(values_BR.shape[-1])[None] == 0
  return (before_BR < top_p) | (top_p >= 1) | first_BR

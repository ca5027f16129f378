"""Vocabulary and building blocks of the synthetic tasks.

An example is a sequence of steps, and a step is a pair of tokens (key, value).
Steps of the context write; the steps after it ask for what a key holds. In the
paired format a model reads the sum of both embeddings, so that a layer needs no
convolution to bring a key and its value together; `as_tokens` puts the two
tokens of a step one after the other.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

KEYS, VALUES, NOISE = 128, 64, 64

# Token ids: keys, then values, noise values, and the markers below.
FIRST_VALUE = KEYS
FIRST_NOISE = FIRST_VALUE + VALUES
QUERY = FIRST_NOISE + NOISE  # asks for the value, or for the first attribute
QUERY_SECOND = QUERY + 1  # asks for the second attribute
RESET = QUERY + 2  # value of a reset step
RESET_GROUP = QUERY + 3  # key of a reset step of group 0; the next is group 1's
NONE = QUERY + 5  # answer where a key holds nothing
VOCAB_SIZE = NONE + 1

NO_LABEL = -1


class Example(NamedTuple):
  """One sequence of a synthetic task.

  Attributes:
    tokens: Key and value of every step.
    labels: Token that answers the query of a step; NO_LABEL for a step of the
      context.
    groups: Index of the query's kind in `Task.groups`; 0 in the context.
  """

  tokens: Int[Array, "*B T 2"]
  labels: Int[Array, "*B T"]
  groups: Int[Array, "*B T"]


def uniforms(key: jax.Array, *sizes: int) -> list[Float[Array, "_"]]:
  """Independent vectors, uniform in [0, 1), from a single draw.

  Each draw of JAX's generator takes a second or two to compile on a CPU.
  """
  x = jax.random.uniform(key, (sum(sizes),))
  return jnp.split(x, list(itertools.accumulate(sizes))[:-1])


def integers(u: Float[Array, "n"], low: int, high: int) -> Int[Array, "n"]:
  """Whole numbers in [low, high)."""
  return low + jnp.floor(u * (high - low)).astype(jnp.int32)


def order(u: Float[Array, "n"]) -> Int[Array, "n"]:
  """A random order of n things."""
  return jnp.argsort(u)


def write_order(
  u_first: Float[Array, "n"], u_rest: Float[Array, "r"], u: Float[Array, "M"]
) -> Int[Array, "M"]:
  """Which of n keys each of M writes binds, each key at least once."""
  n = u_first.size
  which = jnp.concatenate([order(u_first), integers(u_rest, 0, n)])
  return which[order(u)]


def last_write(which: Int[Array, "M"], keys: int) -> Int[Array, "n"]:
  """Last step that binds each key; -1 for none."""
  return jnp.full(keys, -1).at[which].max(jnp.arange(which.size))


def assemble(
  context: Int[Array, "M 2"],
  queries: Int[Array, "n 2"],
  answers: Int[Array, "n"],
  groups: Shaped[Array, "n"],
) -> Example:
  """Context followed by queries, with labels at the queries only."""
  before = jnp.zeros(context.shape[0], jnp.int32)
  return Example(
    jnp.concatenate([context, queries]).astype(jnp.int32),
    jnp.concatenate([before + NO_LABEL, answers]).astype(jnp.int32),
    jnp.concatenate([before, groups]).astype(jnp.int32),
  )


def ask(ids: Int[Array, "n"], marker=QUERY) -> Int[Array, "n 2"]:
  """Query steps for these keys."""
  return jnp.stack([ids, jnp.broadcast_to(marker, ids.shape)], axis=-1)


def as_tokens(example: Example) -> Example:
  """The example with one token per step: key, value, key, value, ...

  The answer to a query is predicted at its second token, the marker. Leading
  batch axes are kept.
  """
  *batch, steps, _ = example.tokens.shape

  def spread(x, fill):
    pair = jnp.stack([jnp.full_like(x, fill), x], axis=-1)
    return pair.reshape(*batch, 2 * steps)

  return Example(
    example.tokens.reshape(*batch, 2 * steps),
    spread(example.labels, NO_LABEL),
    spread(example.groups, 0),
  )

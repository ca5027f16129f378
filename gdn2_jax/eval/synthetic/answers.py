"""Kinds of answers: right, or wrong in a way that tells what the memory did."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from gdn2_jax.eval.synthetic.steps import (
  FIRST_VALUE,
  NO_LABEL,
  NONE,
  VALUES,
  Example,
)

# In this order: the first that holds is the kind of an answer.
KINDS = ("right", "stale", "neighbour", "none", "other")


def kinds_of_answers(
  example: Example, answers: Int[Array, "*B T"]
) -> dict[str, Bool[Array, "*B T"]]:
  """Sorts the answers to the queries of paired examples.

  Args:
    example: Examples in the paired format.
    answers: Token that a model puts first at each step.

  Returns:
    Masks by kind, one of which is true at each query:
      right: the label.
      stale: a value that the key held before, or that was cleared.
      neighbour: a value of another key.
      none: NONE, where the key holds a value.
      other: any other token.
  """
  keys, values = example.tokens[..., 0], example.tokens[..., 1]
  is_query = example.labels != NO_LABEL
  is_write = (values >= FIRST_VALUE) & (values < FIRST_VALUE + VALUES)
  # [B, queries, writes]; every query comes after every write.
  written = is_write[..., None, :] & (
    values[..., None, :] == answers[..., :, None]
  )
  own = keys[..., None, :] == keys[..., :, None]
  holds = {
    "right": answers == example.labels,
    "stale": (written & own).any(-1),
    "neighbour": (written & ~own).any(-1),
    "none": answers == NONE,
    "other": jnp.ones_like(is_query),
  }
  masks, left = {}, is_query
  for kind in KINDS:
    masks[kind] = left & holds[kind]
    left = left & ~holds[kind]
  return masks

"""Runs of a packed row: where state restarts, and where a token stands.

Segment ids are any integers; 0 is padding. A run is a maximal stretch of
tokens with one id, padding in between not counted: where the id of a token
differs from that of the last token that was not padding, a new run starts. Two
runs with the same id are two runs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from gdn2_jax.ops.gdn2_segments import reset_counts


def run_positions(
  segment_ids: Int[Array, "B T"], first: Int[Array, "B"]
) -> Int[Array, "B T"]:
  """Position of each token in its run, padding not counted.

  Args:
    segment_ids: ids, 0 for padding.
    first: position of the first token of the first run, that is, the tokens
      that an incoming state has already seen.

  Returns:
    Positions from 0 (from `first` in the first run); padding repeats the
    position before it.
  """
  run = reset_counts(segment_ids)
  count = jnp.cumsum(segment_ids != 0, axis=1, dtype=jnp.int32)
  starts = (segment_ids != 0) & (run != jnp.pad(run[:, :-1], ((0, 0), (1, 0))))
  before = jax.lax.cummax(jnp.where(starts, count - 1, 0), axis=1)
  offset = jnp.where(run == 0, first[:, None], 0)
  return jnp.maximum(count - 1 - before, 0) + offset

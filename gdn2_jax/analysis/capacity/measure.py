"""Measured recall of random associations with the op itself."""

import numpy as np
from jaxtyping import Float, Int

from gdn2_jax.analysis.memory import states


def random_codes(
  rng: np.random.Generator, *shape: int
) -> Float[np.ndarray, "*shape"]:
  """Random vectors of norm 1 along the last axis, float32."""
  x = rng.normal(size=shape)
  x /= np.linalg.norm(x, axis=-1, keepdims=True)
  return x.astype(np.float32)


def measure_recall(
  key_dim: int,
  counts: Int[np.ndarray, "n"],
  *,
  erase: float,
  codes: int = 64,
  draws: int = 32,
  seed: int = 0,
) -> Float[np.ndarray, "draws n"]:
  """Share of right answers after each number of associations.

  Writes random unit keys with random ones of `codes` value codes, V = K,
  without decay and with w = 1, and reads all keys written so far.

  Args:
    key_dim: K = V, at least 16.
    counts: Numbers of associations, multiples of the first.
    erase: b on all channels.
    codes: M.
    draws: Independent memories.
    seed: Of the random draws.

  Returns:
    Shares of each draw.

  Raises:
    ValueError: a count is no multiple of the first.
  """
  every = int(counts[0])
  for count in counts:
    if count % every:
      raise ValueError(
        f"counts: got {count}, expected multiples of the first, {every}"
      )
  rng, most = np.random.default_rng(seed), int(max(counts))
  table = random_codes(rng, codes, key_dim)
  keys = random_codes(rng, draws, most, 1, key_dim)
  chosen = rng.integers(codes, size=(draws, most))
  values = table[chosen][:, :, None]
  zeros, ones = np.zeros_like(keys), np.ones_like(values)
  gate = np.full_like(keys, erase)
  S = states(zeros, keys, values, zeros, gate, ones, every=every)[:, :, 0]
  recall = []
  for count in counts:
    reading = np.einsum(
      "dnk,dkv->dnv", keys[:, :count, 0], S[int(count) // every - 1]
    )
    answers = (reading @ table.T).argmax(-1)
    recall.append((answers == chosen[:, :count]).mean(-1))
  return np.stack(recall, -1)

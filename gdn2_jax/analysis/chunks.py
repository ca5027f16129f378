"""Decayed scores of a chunk: naive factors beside the tree's, and their errors.

Legend (one head): C tokens of a chunk, K key channels, V value channels.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gdn2_jax.ops.gdn2.inputs import MIN_HEAD_DIM
from gdn2_jax.ops.gdn2.xla_tree import chunk_tree

_FORMS = ("naive factors, float32", "tree of chunk_tree, float32")


def random_head(
  seed: int, tokens: int, *, decay: float = 0.1, dim: int = MIN_HEAD_DIM
) -> tuple[Float[np.ndarray, "C K"], ...]:
  """Draws float64 inputs q, k, v, g, b, w of one head, each [tokens, dim].

  Queries and keys have norm 1, gates are uniform in [0, 1], and log-decays
  uniform in [-2 * decay, 0].

  Raises:
    ValueError: tokens < 1 or decay < 0.
  """
  if tokens < 1:
    raise ValueError(f"tokens={tokens}: expected at least 1")
  if not decay >= 0:
    raise ValueError(f"decay={decay}: expected >= 0")
  rng = np.random.default_rng(seed)
  q, k, v = rng.normal(size=(3, tokens, dim))
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  g = -2 * decay * rng.uniform(size=(tokens, dim))
  b, w = rng.uniform(size=(2, tokens, dim))
  return q, k, v, g, b, w


def exact_scores(
  a: Float[np.ndarray, "C K"],
  k: Float[np.ndarray, "C K"],
  g: Float[np.ndarray, "C K"],
) -> Float[np.ndarray, "C C"]:
  """Scores sum_K a_r exp(G_r - G_s) k_s for r >= s, else 0, in float64.

  G is the cumulative sum of g. The differences are taken before exp, which
  costs an array [C, C, K]: no large number arises, and no matrix product can
  compute it.
  """
  a, k, g = (np.asarray(x, np.float64) for x in (a, k, g))
  G = np.cumsum(g, axis=0)
  later = np.tri(len(g), dtype=bool)[..., None]
  decay = np.exp(np.where(later, G[:, None] - G[None], -np.inf))
  return np.einsum("rc,rsc,sc->rs", a, decay, k)


def naive_scores(
  a: Float[np.ndarray, "C K"],
  k: Float[np.ndarray, "C K"],
  g: Float[np.ndarray, "C K"],
) -> Float[np.ndarray, "C C"]:
  """The same scores as one product (a exp(G)) (k exp(-G))^T, in float32.

  exp(-G) overflows float32 where a channel decays by more than e^88.
  """
  a, k, g = (np.asarray(x, np.float32) for x in (a, k, g))
  G = np.cumsum(g, axis=0)
  with np.errstate(over="ignore", invalid="ignore"):
    return np.tril((a * np.exp(G)) @ (k * np.exp(-G)).T)


def tree_scores(
  q: Float[np.ndarray, "C K"],
  k: Float[np.ndarray, "C K"],
  g: Float[np.ndarray, "C K"],
) -> Float[np.ndarray, "C C"]:
  """The same scores by the package's tree, in float32; C a power of two."""
  q, k, g = (jnp.asarray(x, jnp.float32)[None, None] for x in (q, k, g))
  return np.asarray(chunk_tree(jnp.exp(g), k, q, k).M[0, 0])


def score_errors(
  decays: Sequence[float] | Float[np.ndarray, "N"],
  *,
  tokens: int = 64,
  seeds: int = 4,
) -> dict[str, Float[np.ndarray, "N"]]:
  """Measures the error of both forms in float32 against float64.

  Args:
    decays: Mean log-decay per token, without its sign.
    tokens: C, a power of two.
    seeds: Draws that are averaged.

  Returns:
    By form, |error| / |scores| in the Frobenius norm [N]; inf where a score is
    not finite.
  """
  errors = {name: np.zeros(len(decays)) for name in _FORMS}
  for i, decay in enumerate(decays):
    for seed in range(seeds):
      q, k, _, g, _, _ = random_head(seed, tokens, decay=float(decay))
      # Rounded first, so that the inputs are the same numbers for all.
      q, k, g = (x.astype(np.float32) for x in (q, k, g))
      exact = exact_scores(q, k, g)
      for name, form in zip(_FORMS, (naive_scores, tree_scores), strict=True):
        found = form(q, k, g)
        error = np.inf
        if np.isfinite(found).all():
          error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        errors[name][i] += error / seeds
  return errors


def level_of_pairs(tokens: int) -> Int[np.ndarray, "C C"]:
  """Level of the tree at which each pair r > s meets; -1 for r <= s.

  At level n, s is in an even block of 2^n tokens and r in the odd block after
  it.

  Raises:
    ValueError: tokens is no power of two.
  """
  if tokens < 1 or tokens & (tokens - 1):
    raise ValueError(f"tokens={tokens}: expected a power of two")
  r, s = np.indices((tokens, tokens))
  # The highest bit in which r and s differ.
  level = np.floor(np.log2(np.maximum(r ^ s, 1))).astype(int)
  return np.where(r > s, level, -1)


def tree_factors(
  g: Float[Array | np.ndarray, "C K"],
) -> list[Float[np.ndarray, "_"]]:
  """All decays by which chunk_tree scales operands, one vector per level."""
  alpha = jnp.exp(jnp.asarray(g))[None, None]
  levels = chunk_tree(alpha, alpha, alpha, alpha).levels
  return [
    np.concatenate([np.ravel(level.prefix), np.ravel(level.suffix)])
    for level in levels
  ]

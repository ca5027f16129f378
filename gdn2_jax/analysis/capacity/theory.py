"""Expected recall of random associations that were written once, in order.

Keys are random unit vectors in K dimensions, values random unit codes in V
dimensions, one of M each. A reading S^T k_j is signal * v_j plus noise of other
values; the answer is the code with the largest product. Nothing decays and
w = 1; b is 0 (no erase) or 1 (delta rule) on all channels.
"""

import numpy as np
from jaxtyping import Float
from scipy import stats

_POINTS = 201  # of the integral over the noise of the right code


def reading_moments(
  pairs: int, key_dim: int, *, erase: bool
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
  """Signal and noise of the readings of `pairs` associations, oldest first.

  Without erasing, S^T k_j = v_j + sum_i (k_i . k_j) v_i: signal 1, noise
  (n - 1) / K. With the delta rule a reading is exact when it was written, and a
  later key with cosine c to it subtracts c^2 of it and adds c v and c times
  another reading; E c^2 = 1 / K and E c^4 = 3 / (K (K + 2)).

  Args:
    pairs: n.
    key_dim: K.
    erase: True for the delta rule.

  Returns:
    Expected coefficient of the own value [n], and expected squared norm of the
    rest of the reading [n].

  Raises:
    ValueError: pairs or key_dim is below 1.
  """
  for name, value in (("pairs", pairs), ("key_dim", key_dim)):
    if value < 1:
      raise ValueError(f"{name}={value}: expected at least 1")
  n, K = pairs, key_dim
  if not erase:
    return np.ones(n), np.full(n, (n - 1) / K)
  c2, c4 = 1 / K, 3 / (K * (K + 2))
  # |S|^2 after t writes: each removes 1 / K of it and adds a value of norm 1.
  norms = K * (1 - (1 - 1 / K) ** np.arange(1, n + 1))
  signal, squared = np.zeros(n), np.zeros(n)
  for t in range(n):
    old = norms[t - 1] if t else 0.0
    before = squared[:t]
    # k - c k_i has the part 1 - c^2 along k and c sqrt(1 - c^2) elsewhere.
    elsewhere = (old - before) / max(K - 1, 1)
    squared[:t] = (1 - 2 * c2 + c4) * before + (c2 - c4) * elsewhere + c2
    signal[:t] *= 1 - c2
    signal[t] = squared[t] = 1.0
  return signal, np.maximum(squared - signal**2, 0.0)


def expected_recall(
  pairs: int, key_dim: int, value_dim: int, codes: int, *, erase: bool
) -> float:
  """Expected share of right answers over all associations.

  Scores are taken as Gaussian and independent. The noise is made of codes: with
  a given code its product has the variance noise * spread, spread =
  1 / M + (1 - 1 / M) / V. The score of the right code is then N(signal,
  noise * spread), those of the others N(0, signal^2 / V + noise * spread).

  Args:
    pairs: n.
    key_dim: K.
    value_dim: V.
    codes: M, values to choose from.
    erase: as in `reading_moments`.
  """
  signal, noise = reading_moments(pairs, key_dim, erase=erase)
  x = np.linspace(-6, 6, _POINTS)
  noise = noise * (1 / codes + (1 - 1 / codes) / value_dim)
  right = signal[:, None] + np.sqrt(noise)[:, None] * x
  other = np.sqrt(signal**2 / value_dim + noise)[:, None]
  below = stats.norm.cdf(right / other) ** (codes - 1)
  return float(np.trapezoid(stats.norm.pdf(x) * below, x, axis=-1).mean())


def pairs_at(level: float, counts: np.ndarray, recall: np.ndarray) -> float:
  """Number of pairs at which recall falls below a level, interpolated.

  Args:
    level: Share of right answers.
    counts: Numbers of pairs, ascending.
    recall: Recall at these numbers.

  Raises:
    ValueError: recall does not cross the level.
  """
  below = np.flatnonzero(np.asarray(recall) < level)
  if not len(below) or below[0] == 0:
    raise ValueError(
      f"level={level}: expected a level between the first and the last recall,"
      f" {recall[0]:.2f} and {recall[-1]:.2f}"
    )
  i = below[0]
  share = (recall[i - 1] - level) / (recall[i - 1] - recall[i])
  return float(counts[i - 1] + share * (counts[i] - counts[i - 1]))

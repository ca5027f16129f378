"""States over time against the op, ranks and overwrites by hand."""

import numpy as np
import pytest

from gdn2_jax.analysis.memory import (
  effective_rank,
  overwrite,
  state_norm,
  states,
)

B, T, H, HV, K, V = 2, 11, 1, 2, 16, 16


def inputs(rng):
  def normal(heads, channels):
    return rng.normal(size=(B, T, heads, channels)).astype(np.float32)

  k = normal(H, K)
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  b, w = rng.uniform(size=(2, B, T, HV, K)).astype(np.float32)
  return normal(H, K), k, normal(HV, V), -np.abs(normal(H, K)), b[:, :, :H], w


def recurrence(arrays, ids=None):
  """Eq. 10 token by token in float64: S after every token [T, B, HV, K, V]."""
  _, k, v, g, b, w = (np.asarray(x, np.float64) for x in arrays)
  S = np.zeros((T, B, HV, K, V))
  for i in range(B):
    for j in range(HV):
      now, last = np.zeros((K, V)), 0
      for t in range(T):
        name = 1 if ids is None else ids[i, t]
        if name:
          now = now * (last in (0, name))
          now = np.exp(g[i, t, 0])[:, None] * now
          erased = now.T @ (b[i, t, 0] * k[i, t, 0])
          now = now + np.outer(k[i, t, 0], w[i, t, j] * v[i, t, j] - erased)
          last = name
        S[t, i, j] = now
  return S


@pytest.mark.parametrize("every", [1, 4, 20])
def test_states_are_those_of_the_recurrence(rng, every):
  arrays = inputs(rng)
  trace = states(*arrays, every=every)
  ends = [*range(every, T, every), T]
  expected = recurrence(arrays)[[end - 1 for end in ends]]
  # Float32 noise of states of order 1.
  np.testing.assert_allclose(trace, expected, rtol=0, atol=3e-6)
  assert np.abs(trace[0]).max() > 0.1


@pytest.mark.parametrize("every", [1, 2, 4])
def test_states_restart_at_borders_wherever_the_pieces_lie(rng, every):
  arrays = inputs(rng)
  ids = np.array(
    [[1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [0, 3, 3, 0, 0, 3, 0, 5, 5, 5, 5]],
    np.int32,
  )
  trace = states(*arrays, every=every, segment_ids=ids)
  ends = [*range(every, T, every), T]
  expected = recurrence(arrays, ids)[[end - 1 for end in ends]]
  np.testing.assert_allclose(trace, expected, rtol=0, atol=3e-6)


def test_every_must_be_positive(rng):
  with pytest.raises(ValueError, match="every=0: expected at least 1"):
    states(*inputs(rng), every=0)


def test_rank_counts_equal_directions_and_norm_is_frobenius(rng):
  basis, _ = np.linalg.qr(rng.normal(size=(8, 8)))
  for rank in (1, 3, 8):
    state = 5.0 * basis[:, :rank] @ np.eye(rank, 6 if rank < 8 else 8)
    assert effective_rank(state) == pytest.approx(rank)
    assert state_norm(state) == pytest.approx(5 * np.sqrt(rank))
  # Singular values 3 : 1, entropy of (3/4, 1/4) by hand.
  uneven = effective_rank(np.diag([3.0, 1.0, 0.0]))
  assert uneven == pytest.approx((4 / 3) ** 0.75 * 4**0.25)
  batch = np.stack([np.zeros((4, 4)), np.eye(4)])
  np.testing.assert_allclose(effective_rank(batch), [0, 4])
  np.testing.assert_allclose(state_norm(batch), [0, 2])


# cos(k1, k2) = 1/2. Rows: read with k1, with k2; columns: v1, old v2, new v2.
BEFORE = [[1, 0.5, 0], [0.5, 1, 0]]
CASES = {
  "tied at 1 (delta rule)": ((1, 1, 1), [[0.75, 0, 0.5], [0, 0, 1]]),
  "tied at 1/2": ((0.5, 0.5, 0.5), [[0.875, 0.25, 0.25], [0.25, 0.5, 0.5]]),
  "no erase": ((0, 0, 1), [[1, 0.5, 0.5], [0.5, 1, 1]]),
  "no write": ((1, 1, 0), [[0.75, 0, 0], [0, 0, 0]]),
  "own channels": ((1, 0, 1), [[1, 0.25, 0.5], [0.5, 0.5, 1]]),
  "own channels, b = 2": ((2, 0, 1), [[1, 0, 0.5], [0.5, 0, 1]]),
  "shared channels": ((0, 1, 1), [[0.75, 0.25, 0.5], [0, 0.5, 1]]),
}


@pytest.mark.parametrize("name", CASES)
def test_overwrite_matches_the_numbers_by_hand(name):
  (own, shared, write), after = CASES[name]
  result = overwrite(0.5, erase_own=own, erase_shared=shared, write=write)
  assert result.after.shape == (2, 3)
  # Float32 keys of unit length: a few ulp.
  np.testing.assert_allclose(result.before, BEFORE, atol=1e-6)
  np.testing.assert_allclose(result.after, after, atol=1e-6)


def test_overwrite_sweeps_broadcast():
  c = np.array([0.0, 0.3, 0.9])
  result = overwrite(c, erase_own=1, erase_shared=1, write=1)
  assert result.before.shape == result.after.shape == (3, 2, 3)
  np.testing.assert_allclose(result.after[:, 0, 0], 1 - c**2, atol=1e-6)
  np.testing.assert_allclose(result.after[:, 0, 2], c, atol=1e-6)
  np.testing.assert_allclose(result.after[:, 1], [[0, 0, 1]] * 3, atol=1e-6)


@pytest.mark.parametrize(
  "argument,value",
  [("cosine", 1.0), ("cosine", -0.1), ("erase_own", 2.1), ("write", 1.5)],
)
def test_overwrite_names_the_number_out_of_range(argument, value):
  given = {"cosine": 0.5, "erase_own": 1, "erase_shared": 1, "write": 1}
  with pytest.raises(ValueError, match=f"{argument}={value}: expected in"):
    overwrite(**(given | {argument: value}))

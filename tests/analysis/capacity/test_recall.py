"""Recall of random associations: moments, predictions, measurements."""

import io

import numpy as np
import pytest

from gdn2_jax.analysis.capacity import measure, plots, theory


def readings(pairs, key_dim, erase, draws=400):
  """Coefficients of every value in the reading of every key, by simulation."""
  rng = np.random.default_rng(0)
  keys = measure.random_codes(rng, draws, pairs, key_dim)
  S = np.zeros((draws, key_dim, pairs))  # values are unit vectors: V = n
  for t in range(pairs):
    k = keys[:, t]
    u = np.eye(pairs)[t] - erase * np.einsum("dk,dkv->dv", k, S)
    S += k[:, :, None] * u[:, None]
  return np.einsum("dnk,dkv->dnv", keys, S)


@pytest.mark.parametrize("erase", [False, True])
def test_moments_are_those_of_a_simulation(erase):
  pairs, key_dim = 12, 16
  found = readings(pairs, key_dim, float(erase))
  own = np.einsum("dnn->dn", found)
  noise = (found**2).sum(-1) - own**2
  signal, expected = theory.reading_moments(pairs, key_dim, erase=erase)
  np.testing.assert_allclose(own.mean(0), signal, atol=0.03)
  # The variance of the own coefficient counts as noise in the theory.
  noise += (own - own.mean(0)) ** 2
  np.testing.assert_allclose(noise.mean(0), expected, rtol=0.1, atol=1e-6)


@pytest.mark.parametrize("erase", [False, True])
def test_measured_recall_is_near_the_prediction(erase):
  counts = np.array([8, 32, 64])
  found = measure.measure_recall(32, counts, erase=float(erase), draws=8)
  expected = [
    theory.expected_recall(int(n), 32, 32, 64, erase=erase) for n in counts
  ]
  np.testing.assert_allclose(found.mean(0), expected, atol=0.12)
  assert found.shape == (8, 3)
  assert np.all(np.diff(found.mean(0)) < 0)


def test_pairs_at_a_level_are_interpolated():
  counts = np.array([1, 2, 4])
  assert theory.pairs_at(0.75, counts, np.array([1, 0.9, 0.6])) == 3
  with pytest.raises(ValueError, match=r"level=0\.5: expected a level between"):
    theory.pairs_at(0.5, counts, np.array([1, 0.9, 0.6]))


def test_wrong_arguments_are_refused():
  with pytest.raises(ValueError, match="pairs=0: expected at least 1"):
    theory.reading_moments(0, 16, erase=True)
  with pytest.raises(ValueError, match="got 5, expected multiples of the fir"):
    measure.measure_recall(16, np.array([2, 5]), erase=1.0)


def test_figures_show_the_numbers():
  pairs, recall = np.array([2, 4]), np.array([[1.0, 0.5], [1.0, 0.7]])
  figure = plots.recall_by_pairs(
    {"delta rule": {"K = 16": (pairs, recall, recall[0])}}, 1 / 64
  )
  figure.savefig(io.BytesIO())
  assert figure.axes[0].lines[1].get_ydata().tolist() == [1.0, 0.6]
  floats = np.array([256.0, 1024.0])
  figure = plots.pairs_by_state(floats, {"a": (pairs, pairs)}, 0.9)
  figure.savefig(io.BytesIO())
  assert figure.axes[0].lines[2].get_ydata().tolist() == [16, 32]
  figure = plots.trained_recall(pairs, {"a": recall[0]}, {"b": recall}, 4)
  figure.savefig(io.BytesIO())
  assert figure.axes[0].lines[1].get_ydata().tolist() == [1.0, 0.6]

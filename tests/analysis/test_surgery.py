"""Closed-form edits of a state, and the figures of them."""

import io

import numpy as np
import pytest

from gdn2_jax.analysis import plots_surgery, surgery

K, V, n = 16, 24, 6
KEYS, VALUES = surgery.unit_rows(0, n, K), surgery.unit_rows(1, n, V)


@pytest.mark.parametrize("erase", [0.0, 0.5, 1.0])
def test_states_are_sums_of_what_was_written(erase):
  S = surgery.store(KEYS, VALUES, erase=erase)
  U = surgery.written_by_delta_rule(KEYS, VALUES, erase=erase)
  np.testing.assert_allclose(S, KEYS.T @ U, atol=1e-6)
  np.testing.assert_allclose(surgery.read_keys(S, U), KEYS, atol=1e-5)


def test_an_edit_is_exact_and_hits_others_by_their_cosine():
  S = surgery.store(KEYS, VALUES)
  new = surgery.unit_rows(2, 1, V)[0]
  changed = surgery.edit(S, KEYS[2], new)
  np.testing.assert_allclose(surgery.read(changed, KEYS[2]), new, atol=1e-6)
  cosines = np.array([-1.0, -0.3, 0.0, 0.8])
  others = surgery.at_cosines(KEYS[2], cosines)
  np.testing.assert_allclose(others @ KEYS[2], cosines, atol=1e-6)
  np.testing.assert_allclose((others**2).sum(-1), 1, rtol=1e-5)
  step = new - surgery.read(S, KEYS[2])
  moved = surgery.read(changed - S, others)
  np.testing.assert_allclose(moved, np.outer(cosines, step), atol=1e-6)


def test_gates_of_an_edit_are_those_of_the_recurrence():
  S, b = surgery.store(KEYS, VALUES), np.linspace(0, 1, K)
  w = np.linspace(0, 1, V)
  found = surgery.edit(S, KEYS[0], VALUES[3], erase=b, write=w)
  expected = S + np.outer(KEYS[0], w * VALUES[3] - S.T @ (b * KEYS[0]))
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_private_keys_spare_the_other_keys():
  d = surgery.private_key(KEYS, 4)
  np.testing.assert_allclose(KEYS @ d, np.arange(n) == 4, atol=1e-6)
  cost = surgery.private_costs(16, draws=3)
  assert cost.norms.shape == (3, 15) and (cost.norms > 1 - 1e-6).all()
  assert cost.expected[0] == 1 and cost.expected[-1] == pytest.approx(8**0.5)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: surgery.read_keys(np.zeros((K, 4)), np.zeros((5, 4))),
      "written: 5 vectors, expected at most V=4",
    ),
    (
      lambda: surgery.at_cosines(KEYS[0], np.array([2.0])),
      r"cosines=2.0: expected in \[-1, 1\]",
    ),
    (
      lambda: surgery.private_key(np.ones((3, K)), 0),
      "keys: 3 keys of rank 1, expected linearly independent",
    ),
  ],
)
def test_wrong_arguments_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_figures_show_the_readings():
  figure = plots_surgery.key_cosines(KEYS, {"a": KEYS, "b": 2 * KEYS})
  figure.savefig(io.BytesIO())
  shown = figure.axes[1].images[0].get_array()
  np.testing.assert_allclose(shown, KEYS @ KEYS.T, atol=1e-6)
  cosines = np.array([-0.5, 0.5])
  figure = plots_surgery.collateral(cosines, {"e": (np.ones(2), 2.0)})
  figure.savefig(io.BytesIO())
  line, points = figure.axes[0].lines[:2]
  assert line.get_ydata().tolist() == [0, 2]
  assert points.get_xdata().tolist() == [0.5, 0.5]
  plots_surgery.private_cost(surgery.private_costs(16, 2)).savefig(io.BytesIO())

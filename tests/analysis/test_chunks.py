"""Decayed scores of a chunk, and the figures of them."""

import io

import numpy as np
import pytest

from gdn2_jax.analysis import chunks, plots_chunks


def test_scores_are_products_with_the_decay_between_two_tokens():
  q, k, _, g, *_ = chunks.random_head(0, 5)
  scores = chunks.exact_scores(q, k, g)
  assert scores[3, 1] == pytest.approx(
    (q[3] * np.exp(g[2] + g[3]) * k[1]).sum(), rel=1e-13
  )
  assert scores[2, 2] == pytest.approx(q[2] @ k[2], rel=1e-13)
  assert not np.triu(scores, 1).any()


def test_both_forms_agree_where_nothing_overflows():
  q, k, _, g, *_ = chunks.random_head(1, 8)
  exact = chunks.exact_scores(q, k, g)
  for form in (chunks.naive_scores, chunks.tree_scores):
    np.testing.assert_allclose(form(q, k, g), exact, atol=1e-6)


def test_the_naive_form_overflows_and_the_tree_does_not():
  naive, tree = chunks.score_errors([0.1, 20.0], tokens=16, seeds=2).values()
  assert np.isfinite(naive[0]) and np.isinf(naive[1])
  assert tree.max() < 1e-6
  figure = plots_chunks.errors_by_decay(
    np.array([0.1, 20.0]), {"naive": naive, "tree": tree}, 16
  )
  figure.savefig(io.BytesIO())
  (axes,) = figure.axes
  crosses = [line for line in axes.lines if line.get_marker() == "x"]
  assert [line.get_xdata().tolist() for line in crosses] == [[20.0]]


def test_every_pair_meets_once_and_its_factors_are_at_most_one():
  levels = chunks.level_of_pairs(8)
  assert (levels[1::2, ::2].diagonal() == 0).all()
  assert levels[7, 0] == levels[4, 3] == 2 and levels[6, 5] == 1
  assert (levels >= 0).sum() == 8 * 7 // 2
  factors = chunks.tree_factors(chunks.random_head(0, 8, decay=50.0)[3])
  assert len(factors) == 3
  assert all(f.min() >= 0 and f.max() <= 1 for f in factors)
  plots_chunks.levels_of_tree(levels).savefig(io.BytesIO())


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: chunks.random_head(0, 0), "tokens=0: expected at least 1"),
    (lambda: chunks.random_head(0, 4, decay=-1.0), "decay=-1.0: expected >= 0"),
    (lambda: chunks.level_of_pairs(6), "tokens=6: expected a power of two"),
  ],
)
def test_wrong_arguments_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()

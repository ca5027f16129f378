"""The n-gram baselines: normalised, right on a hand example, and strong."""

import numpy as np
import pytest

from gdn2_jax.eval.loss.ngram import (
  Bigram,
  Unigram,
  ngram_baselines,
  training_pairs,
)


def all_probabilities(bigram, context):
  contexts = np.full(bigram.vocab_size, context)
  return bigram.probability(contexts, np.arange(bigram.vocab_size))


@pytest.mark.parametrize("pairs", [0, 1, 2, 50, 5000])
def test_probabilities_sum_to_one(rng, pairs):
  vocab_size = 40
  # Zipf-like, and tokens 35 to 39 never occur.
  tokens = np.minimum(rng.zipf(1.3, pairs + 1) - 1, 34)
  contexts, targets = tokens[:-1], tokens[1:]
  unigram = Unigram(targets, vocab_size)
  np.testing.assert_allclose(unigram.probabilities.sum(), 1, atol=1e-12)
  assert unigram.probabilities.min() > 0
  bigram = Bigram(contexts, targets, vocab_size)
  for context in range(vocab_size):
    p = all_probabilities(bigram, context)
    np.testing.assert_allclose(p.sum(), 1, atol=1e-12)
    assert p.min() > 0


def test_unigram_by_hand():
  unigram = Unigram(np.array([1, 1, 3]), 5)
  np.testing.assert_allclose(
    unigram.probabilities, np.array([1, 3, 1, 2, 1]) / 8
  )


def test_bigram_by_hand():
  """Pairs 01 x1, 02 x2, 12 x3, 21 x1, with the formulas worked out.

  Pair counts 1, 2, 3, 1: n1=2, n2=1, n3=1, n4=0, Y = 2 / (2 + 2) = 1/2,
  D1 = 1 - 2 Y n2/n1 = 1/2, D2 = 2 - 3 Y n3/n2 = 1/2, D3 = 3 - 4 Y n4/n3 = 3,
  which is not below 3, so D3 = 3/2.
  Contexts of token 1: {0, 2}, of token 2: {0, 1}: counts 2, 2 of 4. There
  n1 = 0, so Y = 0 and D2 = 2, which is not below 2, so D2 = 1:
  p1(1) = p1(2) = (2 - 1)/4 + rest, rest = (1 - 2/4) / 4 = 1/8.
  """
  contexts = np.array([0, 0, 0, 1, 1, 1, 2])
  targets = np.array([1, 2, 2, 2, 2, 2, 1])
  bigram = Bigram(contexts, targets, 4)
  lower = np.array([1, 3, 3, 1]) / 8
  want = {
    0: np.array([0, 0.5, 1.5, 0]) / 3 + (0.5 + 0.5) / 3 * lower,
    1: np.array([0, 0, 1.5, 0]) / 3 + 1.5 / 3 * lower,
    2: np.array([0, 0.5, 0, 0]) / 1 + 0.5 / 1 * lower,
    3: lower,  # never seen as a context
  }
  for context, p in want.items():
    np.testing.assert_allclose(
      all_probabilities(bigram, context), p, atol=1e-15, err_msg=str(context)
    )


def test_discounts_of_regular_text_are_the_published_ones(rng):
  """n_r = 80, 40, 20, 10 pairs seen r times: Y = 1/2, D = 1/2, 5/4, 2."""
  contexts = np.repeat(
    np.arange(150), np.repeat([1, 2, 3, 4], [80, 40, 20, 10])
  )
  bigram = Bigram(contexts, np.ones_like(contexts), 150)
  backoff = bigram.probability(np.arange(150), np.zeros(150, int))
  backoff = backoff / backoff[0] * 0.5  # lambda(u) of a context seen once
  want = np.repeat([1 / 2, 5 / 4 / 2, 2 / 3, 2 / 4], [80, 40, 20, 10])
  np.testing.assert_allclose(backoff, want)


def test_pairs_do_not_cross_documents():
  contexts, targets = training_pairs(np.array([5, 6, 0, 7, 0, 8], np.uint16), 0)
  np.testing.assert_array_equal(contexts, [5, 6, 7])
  np.testing.assert_array_equal(targets, [6, 0, 0])


def test_baselines_score_the_masked_targets_and_context_helps(dataset):
  unigram, bigram = ngram_baselines(dataset, seq_len=16, batch_size=3)
  validation = dataset.validation_tokens()
  contexts, targets = training_pairs(validation, 0)
  p = Unigram(training_pairs(dataset.train_tokens(), 0)[1], 29).probabilities
  assert unigram.tokens == bigram.tokens == len(targets)
  np.testing.assert_allclose(
    unigram.nats_per_token, -np.log(p[targets]).mean(), rtol=1e-12
  )
  fitted = Bigram(*training_pairs(dataset.train_tokens(), 0), 29)
  np.testing.assert_allclose(
    bigram.nats_per_token,
    -np.log(fitted.probability(contexts, targets)).mean(),
    rtol=1e-12,
  )
  # The corpus steps by 0, 1 or 2: ln 3 nats, plus the ends of documents.
  assert 1.1 < bigram.nats_per_token < 1.8 < 3.0 < unigram.nats_per_token
  np.testing.assert_allclose(
    bigram.bits_per_byte, bigram.nats_per_token / np.log(2) / 3.2, rtol=1e-12
  )


def test_rows_limit_the_text_not_the_batches(dataset):
  whole = ngram_baselines(dataset, seq_len=16, batch_size=3, rows=7)
  other = ngram_baselines(dataset, seq_len=16, batch_size=64, rows=7)
  scored = np.count_nonzero(dataset.validation_tokens()[: 7 * 16] != 0)
  assert [r.tokens for r in whole] == [r.tokens for r in other] == [scored] * 2
  for a, b in zip(whole, other, strict=True):
    np.testing.assert_allclose(a.nats_per_token, b.nats_per_token, rtol=1e-12)


@pytest.mark.parametrize("bad", [[-1, 2], [0, 5]])
def test_ids_outside_the_vocabulary_are_refused(bad):
  good = np.array([1, 2])
  with pytest.raises(ValueError, match=r"targets.*\[0, 5\)"):
    Unigram(np.array(bad), 5)
  with pytest.raises(ValueError, match=r"contexts.*\[0, 5\)"):
    Bigram(np.array(bad), good, 5)
  with pytest.raises(ValueError, match=r"contexts.*as many as"):
    Bigram(good[:1], good, 5)

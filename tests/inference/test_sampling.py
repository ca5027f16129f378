"""Samplers against their distribution in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdn2_jax.inference.sampling import (
  GREEDY,
  Sampler,
  filter_logits,
  row_samplers,
  sample,
)


def oracle(logits, temperature, top_k, top_p):
  """The distribution of one row in float64, straight from the definition."""
  vocab = len(logits)
  # Most probable first, the lower id first among equals.
  order = sorted(range(vocab), key=lambda i: (-logits[i], i))
  kept = order[: top_k or vocab]
  weights = np.exp((np.float64(logits) - np.max(logits)) / temperature)
  mass = sum(weights[i] for i in kept)
  nucleus, total = [], 0.0
  for i in kept:
    nucleus.append(i)
    total += weights[i] / mass
    if total >= top_p:
      break
  p = np.zeros(vocab)
  p[nucleus] = weights[nucleus] / weights[nucleus].sum()
  return p


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 40])
@pytest.mark.parametrize("top_p", [0.05, 0.61, 0.93, 1.0])
def test_distribution_is_the_oracle(rng, temperature, top_k, top_p):
  logits = rng.normal(0, 2, (3, 40)).astype(np.float32)
  logits[1, :8] = logits[1, 8]  # ties
  sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p)
  got = jax.nn.softmax(filter_logits(jnp.asarray(logits), sampler))
  want = np.stack([oracle(row, temperature, top_k, top_p) for row in logits])
  np.testing.assert_array_equal(np.asarray(got) > 0, want > 0)
  # float32 softmax of 40 numbers: measured 2e-7.
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_samples_follow_the_distribution(rng):
  logits = rng.normal(0, 1.5, 12).astype(np.float32)
  sampler = Sampler(temperature=0.8, top_k=8, top_p=0.9)
  p = oracle(logits, 0.8, 8, 0.9)
  n = 20_000
  keys = jax.random.split(jax.random.key(1), n)
  rows = jnp.broadcast_to(jnp.asarray(logits), (n, 12))
  counts = np.bincount(sample(rows, keys, sampler), minlength=12)
  assert counts[p == 0].sum() == 0
  kept = p > 0
  chi2 = np.sum((counts[kept] - n * p[kept]) ** 2 / (n * p[kept]))
  # Chance of a chi2 above mean + 6 standard deviations: below 1e-5.
  freedom = kept.sum() - 1
  assert chi2 < freedom + 6 * np.sqrt(2 * freedom)
  # The test sees a wrong distribution: temperature 0.9 instead of 0.8.
  q = oracle(logits, 0.9, 8, 0.9)[kept]
  wrong = np.sum((counts[kept] - n * q) ** 2 / (n * q))
  assert wrong > freedom + 6 * np.sqrt(2 * freedom)


def test_a_row_does_not_depend_on_its_batch(rng):
  logits = jnp.asarray(rng.normal(size=(4, 30)).astype(np.float32))
  keys = jax.random.split(jax.random.key(2), 4)
  sampler = Sampler(top_k=9, top_p=0.95)
  together = sample(logits, keys, sampler)
  alone = [
    sample(logits[i : i + 1], keys[i : i + 1], sampler) for i in range(4)
  ]
  np.testing.assert_array_equal(together, np.concatenate(alone))


@pytest.mark.slow
def test_rows_with_settings_of_their_own_draw_what_they_draw_alone(rng):
  """With and without ranks: the noise of an id depends on the key alone."""
  samplers = [
    Sampler(),
    GREEDY,
    Sampler(temperature=0.3),
    Sampler(temperature=1.7, top_k=5),
    Sampler(top_p=0.6),
    Sampler(temperature=2.0, top_k=9, top_p=0.8),
    Sampler(vocab_size=12),
    Sampler(temperature=0.0, vocab_size=3),
  ]
  logits = jnp.asarray(rng.normal(0, 2, (8, 40)).astype(np.float32))
  rows = row_samplers(samplers, 40)
  one = jax.jit(sample)
  for seed in range(5):
    keys = jax.random.split(jax.random.key(seed), 8)
    want = [
      sample(logits[i : i + 1], keys[i : i + 1], sampler)[0]
      for i, sampler in enumerate(samplers)
    ]
    np.testing.assert_array_equal(one(logits, keys, rows), want)
  # And where no row needs its ids ranked.
  plain = row_samplers(samplers[:3], 40)
  np.testing.assert_array_equal(one(logits[:3], keys[:3], plain), want[:3])
  with pytest.raises(ValueError, match="top_k"):
    row_samplers([Sampler(top_k=41)], 40)


def test_greedy_takes_the_first_best_and_needs_no_luck():
  logits = jnp.asarray([[0.0, 3.0, 3.0, -1.0], [5.0, 5.0, 5.0, 5.0]])
  keys = jax.random.split(jax.random.key(3), 2)
  np.testing.assert_array_equal(sample(logits, keys, GREEDY), [1, 0])
  kept = filter_logits(logits, GREEDY)
  np.testing.assert_array_equal(np.isfinite(kept).sum(axis=1), [1, 1])


def test_tiny_temperature_is_greedy_and_finite():
  logits = jnp.asarray([[1e4, -1e4, 9999.0]], jnp.float32)
  sampler = Sampler(temperature=1e-6, top_p=0.5)
  assert sample(logits, jax.random.split(jax.random.key(0), 1), sampler) == 0
  p = jax.nn.softmax(filter_logits(logits, sampler))
  np.testing.assert_array_equal(p, [[1.0, 0.0, 0.0]])


def test_low_precision_logits_are_sampled_in_float32(rng):
  logits = jnp.asarray(rng.normal(size=(2, 30)), jnp.bfloat16)
  kept = filter_logits(logits, Sampler(temperature=0.7))
  assert kept.dtype == jnp.float32
  exact = np.asarray(logits, np.float64) / 0.7
  got = np.asarray(kept, np.float64)
  np.testing.assert_allclose(
    got - got.max(1, keepdims=True),
    exact - exact.max(1, keepdims=True),
    rtol=1e-6,
    atol=1e-6,
  )


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("temperature", -0.1),
    ("temperature", 1e-9),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", float("nan")),
  ],
)
def test_bad_values_are_refused_by_name(name, value):
  with pytest.raises(ValueError, match=name):
    Sampler(**{name: value})


def test_top_k_above_the_vocabulary_is_refused():
  with pytest.raises(ValueError, match=r"top_k.*31"):
    filter_logits(jnp.zeros((1, 30)), Sampler(top_k=31))


@pytest.mark.parametrize(
  "sampler",
  [
    Sampler(vocab_size=3),
    Sampler(vocab_size=3, top_p=0.9),
    Sampler(vocab_size=3, temperature=0.0),
  ],
)
def test_ids_past_the_vocabulary_are_never_drawn(sampler):
  logits = jnp.asarray([[1.0, 2.0, 0.0, 9.0, 9.0]] * 64)
  keys = jax.random.split(jax.random.key(0), 64)
  assert sample(logits, keys, sampler).max() < 3
  kept = filter_logits(logits, sampler)
  assert kept.shape == logits.shape
  assert np.isneginf(kept[:, 3:]).all() and np.isfinite(kept[:, 1]).all()


def test_vocabulary_past_the_models_is_refused():
  with pytest.raises(ValueError, match=r"sampler\.vocab_size"):
    Sampler(vocab_size=9).check(8)
  with pytest.raises(ValueError, match="top_k"):
    Sampler(vocab_size=3, top_k=4).check(8)
